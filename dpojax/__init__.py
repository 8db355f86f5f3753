"""dpojax: Direct Preference Optimization in JAX, from a laptop to a TPU pod.

Importing this package touches no device and imports neither torch nor transformers.
The way of the data, one module per arrow, is drawn in `dpojax/data/__init__.py`.
"""

__version__ = "0.1.0"
