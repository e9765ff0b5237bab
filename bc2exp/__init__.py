"""bc2exp: Baichuan2 7B and 13B, trained correctly on NPUs, GPUs and CPUs with one configuration."""

import os

__version__ = "0.1.0"

# torch loads device plug-ins by itself, and one whose driver library is not there (CANN's set_env.sh was not
# sourced) ends `import torch`. The backends import what they need.
if "ASCEND_HOME_PATH" not in os.environ:
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
