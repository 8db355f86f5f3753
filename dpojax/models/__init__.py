"""Token ids -> hidden states of every packed token. Flax stays inside this package."""

from dpojax.models.config import ModelConfig as ModelConfig
from dpojax.models.decoder import Model as Model
from dpojax.models.decoder import make_decoder as make_decoder
