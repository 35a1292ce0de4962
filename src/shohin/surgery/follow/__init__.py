"""How each operator's integers follow a plan, one file per family."""

from shohin.surgery.follow import layers, movement, recurrent
from shohin.surgery.follow.table import FOLLOW, Follow, follow

__all__ = ["FOLLOW", "Follow", "follow", "layers", "movement", "recurrent"]
