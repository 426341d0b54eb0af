"""Stand-in for torchvision, put first on PYTHONPATH of a CPU server process only.

SGLang and transformers import it unconditionally for image models, and the published torchvision wheels do not load
beside the pinned CPU build of torch. It holds exactly the names those imports ask for; text models never call them.
"""

__version__ = "0.0.0"
