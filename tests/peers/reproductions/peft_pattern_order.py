"""peft 0.21.2 saves `alpha_pattern` sorted, and the first pattern that fits decides: the scale changes.

Prints:

expected: alpha 4.0 after saving and loading
got: alpha 2.0 after saving and loading
"""

import tempfile

from peft import LoraConfig

config = LoraConfig(target_modules=["v_proj"], alpha_pattern={r"v_proj": 4.0, r"\w_proj": 2.0})
with tempfile.TemporaryDirectory() as folder:
    config.save_pretrained(folder)
    again = LoraConfig.from_pretrained(folder)
print(f"expected: alpha {next(iter(config.alpha_pattern.values()))} after saving and loading")
print(f"got: alpha {next(iter(again.alpha_pattern.values()))} after saving and loading")
