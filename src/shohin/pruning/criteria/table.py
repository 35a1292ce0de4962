"""All criteria by name."""

from __future__ import annotations

from shohin.pruning.criteria.activation import apoz, mean_activation
from shohin.pruning.criteria.chance import random
from shohin.pruning.criteria.elimination import obs_greedy
from shohin.pruning.criteria.gradient import first_order, obd, taylor
from shohin.pruning.criteria.inputs import Criterion
from shohin.pruning.criteria.magnitude import l1, l2
from shohin.pruning.criteria.median import geometric_median
from shohin.pruning.criteria.obs import layer_obs, obs
from shohin.pruning.criteria.slimming import norm_scale
from shohin.pruning.criteria.wanda import wanda

CRITERIA: dict[str, Criterion] = {
    c.name: c
    for c in (
        Criterion("magnitude", l2, "weights", "Li et al. 2017, arXiv 1608.08710"),
        Criterion("magnitude_l1", l1, "weights", "Li et al. 2017, arXiv 1608.08710"),
        Criterion("norm_scale", norm_scale, "weights", "Liu et al. 2017, arXiv 1708.06519"),
        Criterion("geometric_median", geometric_median, "weights", "He et al. 2019, arXiv 1811.00250"),
        Criterion("random", random, "weights", "Li et al. 2022, arXiv 2205.05676"),
        Criterion("activation", mean_activation, "batches", "Molchanov et al. 2017, arXiv 1611.06440"),
        Criterion("apoz", apoz, "batches", "Hu et al. 2016, arXiv 1607.03250"),
        Criterion("wanda", wanda, "batches", "Sun et al. 2023, arXiv 2306.11695"),
        Criterion("layer_obs", layer_obs, "batches", "Hassibi & Stork 1993; Frantar et al. 2022, arXiv 2208.11580"),
        Criterion("taylor", taylor, "gradients", "Molchanov et al. 2019, arXiv 1906.10771"),
        Criterion("first_order", first_order, "gradients", "Molchanov et al. 2019, arXiv 1906.10771"),
        Criterion("obd", obd, "gradients", "LeCun et al. 1990, Optimal Brain Damage"),
        Criterion("obs", obs, "gradients", "Hassibi & Stork 1993; Frantar et al. 2022, arXiv 2208.11580"),
        Criterion("obs_greedy", obs_greedy, "gradients", "Hassibi & Stork 1993; Kurtic et al. 2023, arXiv 2302.04089"),
    )
}
