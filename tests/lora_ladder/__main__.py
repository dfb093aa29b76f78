"""`python -m lora_ladder my_adapter:MyTrainer`."""

from __future__ import annotations

import sys

from tests.lora_ladder.command import main

sys.exit(main())
