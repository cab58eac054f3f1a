"""What ``--model-loader-extra-config`` may say."""

import pytest

from hotweights import UsageError
from hotweights.engines.vllm.options import options_from


def test_one_name_is_as_good_as_a_list():
    assert options_from({"allow_missing": "*.scale"}) == options_from({"allow_missing": ["*.scale"]})


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"memory": 1}, "unknown key of model_loader_extra_config 'memory'; known are: allow_missing"),
        ({"guard": "poison"}, "unknown key of model_loader_extra_config 'guard'"),
        ({"verify": "twice"}, "unknown verify in model_loader_extra_config 'twice'; known are: loader, off"),
        ({"threads": 0}, "threads in model_loader_extra_config is a positive whole number; found 0"),
        ({"allow_missing": 3}, "allow_missing in model_loader_extra_config is a pattern of names, or several; found 3"),
        ({"memory_limit": "2G"}, "memory_limit in model_loader_extra_config is a positive whole number; found '2G'"),
    ],
)
def test_options_nobody_knows(extra, words):
    with pytest.raises(UsageError) as error:
        options_from(extra)
    assert words in str(error.value)
