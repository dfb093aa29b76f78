"""Reading and writing so that nothing of the user's is lost: whole files, whole folders, free places."""
