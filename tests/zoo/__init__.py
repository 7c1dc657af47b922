"""The zoo: sham defenses, which look resistant to fine-tuning and are not, each with the adversary that undoes it.

Every sham keeps the benign predictions of its original and hinders only the *mechanics* of fine-tuning, by scales,
gradients, modes, gates or hidden state; the model's knowledge stays. The verdict of an audit must never be `resists`.
A new one is a function with the decorator `sham`, in the module of its family.
"""

from zoo import answers as answers
from zoo import attention as attention
from zoo import blocked_gradients as blocked_gradients
from zoo import blocks as blocks
from zoo import carriers as carriers
from zoo import checksums as checksums
from zoo import collapse as collapse
from zoo import denoising as denoising
from zoo import dormant as dormant
from zoo import encoded as encoded
from zoo import gates as gates
from zoo import hidden_weights as hidden_weights
from zoo import landscapes as landscapes
from zoo import language as language
from zoo import lines as lines
from zoo import locks as locks
from zoo import repairs as repairs
from zoo import scales as scales
from zoo import stations as stations
from zoo import step_lengths as step_lengths
from zoo import training_mode as training_mode
from zoo import training_stream as training_stream
from zoo.registry import ZOO as ZOO
from zoo.registry import Case as Case
from zoo.registry import Sham as Sham
from zoo.registry import case as case
from zoo.registry import make as make
from zoo.settings import SETTINGS as SETTINGS
from zoo.settings import Setting as Setting
