"""What `train` is made of: the job, the folder of a run, who may write there, how to go on."""
