"""What can be set, and what must a setting be?"""

from dpojax.config.load import apply_override as apply_override
from dpojax.config.load import from_config_dict as from_config_dict
from dpojax.config.load import load_config_file as load_config_file
from dpojax.config.load import to_dict as to_dict
