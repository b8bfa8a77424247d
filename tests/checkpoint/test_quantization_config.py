"""What a file says of its layers is small, complete and checked before it is believed."""

import json

import pytest

from dmquant.checkpoint.quantization_config import DmquantConfig
from dmquant.errors import DamagedFile, InputError
from dmquant.nn.scheme import LayerScheme
from dmquant.quantizers.per_part import PerPart
from dmquant.quantizers.per_timestep import PerTimestep

CONFIG = DmquantConfig(
    weight_bits=4, act_bits=8, kinds=["temporal"], overrides={"conv_in": [8, 8, "temporal", "split:2"]}, attention_bits=8,
    timing={"num_steps": 3, "lookup": "linear"}, method="minmax", settings={"lr": 0.1}, record={"seed": 3},
)  # fmt: skip


def test_a_config_prints_itself_and_survives_json():
    assert CONFIG.quant_method == "dmquant" and CONFIG.quant_method.value == "dmquant"
    assert json.loads(CONFIG.to_json_string()) == CONFIG.to_dict() and CONFIG.to_dict()["quant_method"] == "dmquant"
    assert type(CONFIG.to_dict()["quant_method"]) is str and "minmax" in repr(CONFIG)
    again = DmquantConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict())))
    assert again.to_dict() == CONFIG.to_dict() and again.scheme == CONFIG.scheme and again.run == CONFIG.run


def test_the_layout_is_that_of_the_words():
    scheme = CONFIG.scheme
    assert scheme.layer("conv_in") == LayerScheme(8, 8, (PerTimestep(), PerPart(2)))
    assert scheme.layer("mid") == LayerScheme(4, 8, (PerTimestep(),))
    assert scheme.attention_bits == 8 and scheme.timing == (3, "linear")


def test_grids_per_timestep_need_a_timing():
    with pytest.raises(DamagedFile, match="timing is missing: there are grids per timestep"):
        DmquantConfig.from_dict({**CONFIG.to_dict(), "timing": None})


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"quant_method": "gguf"}, InputError, "this is a gguf checkpoint"),
        ({"format_version": 2, "producer": "dmquant 3.1"}, InputError, r"needs dmquant >= 3.1"),
        ({"format_version": "1"}, DamagedFile, "format_version cannot be '1'"),
        ({"weight_bits": 0}, DamagedFile, "weight_bits cannot be 0"),
        ({"weight_bits": 33}, DamagedFile, "weight_bits cannot be 33"),
        ({"weight_bits": "4"}, DamagedFile, "weight_bits cannot be '4'"),
        ({"act_bits": True}, DamagedFile, "act_bits cannot be True"),
        ({"weight_bits": 10**30}, DamagedFile, "weight_bits cannot be 1000"),
        ({"act_bits": ...}, DamagedFile, "act_bits is missing"),
        ({"colour": "red"}, DamagedFile, "colour is unknown"),
        ({"overrides": {"conv_in": [8]}}, DamagedFile, "overrides cannot be"),
        ({"overrides": {"conv_in": [8, 9]}}, DamagedFile, "overrides cannot be"),
        ({"overrides": {"conv_in": [8, 8, "towers"]}}, DamagedFile, "overrides cannot be"),
        ({"kinds": ["bases", "bases"]}, DamagedFile, "kinds cannot be"),
        ({"overrides": None}, DamagedFile, "overrides cannot be None"),
        ({"settings": []}, DamagedFile, "settings cannot be"),
        ({"record": {"loss": float("nan")}}, DamagedFile, "record cannot be"),
    ],
)
def test_a_config_that_is_not_ours_to_read_is_refused_with_its_key(changes, error, message):
    changed = {key: value for key, value in {**CONFIG.to_dict(), **changes}.items() if value is not ...}
    with pytest.raises(error, match=message):
        DmquantConfig.from_dict(changed)
