"""The attention rule of packed rows: on plain XLA, and on vendors' kernels."""
