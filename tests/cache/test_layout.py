from __future__ import annotations

import pytest

from disagg.cache.layout import LayerSpec, derive_layout


def spec(index, window=None, *, sinks=0, heads=2, dim=4, dtype="float32", producer=None):
    return LayerSpec(index, window, sinks, heads, dim, dtype, index if producer is None else producer)


def names(layout):
    return [group.name for group in layout.groups]


def test_layers_of_one_kind_make_one_group():
    layout = derive_layout([spec(0, 64), spec(1, 64), spec(2), spec(3, 64)], block_size=16, max_model_len=512)
    assert names(layout) == ["window-64", "full"]
    assert [group.layers for group in layout.groups] == [(0, 1, 3), (2,)]
    assert layout.slot_nbytes == (3 * 2 * 2 * 16 * 4 * 4, 2 * 2 * 16 * 4 * 4)
    assert layout.place(3) == (0, 2)


def test_windows_that_nobody_leaves_become_full_before_grouping():
    layout = derive_layout([spec(0, 512, sinks=4), spec(1), spec(2, 511)], block_size=16, max_model_len=512)
    assert names(layout) == ["full", "window-511"]
    assert layout.groups[0].layers == (0, 1)
    assert layout.groups[0].num_sink_tokens == 0


def test_groups_of_equal_slot_bytes_share_a_pool():
    mixed = [spec(0, 64), spec(1)]
    layout = derive_layout(mixed, block_size=16, max_model_len=512)
    assert layout.num_groups == 2
    assert layout.pool_of_group == (0, 0)
    assert layout.num_pools == 1


def test_groups_that_differ_in_shape_only_get_numbered_names_and_their_own_pools():
    layers = [spec(0, 64, dim=4), spec(1, 64, dim=8), spec(2, 64, heads=1), spec(3, 64, dtype="bfloat16")]
    layout = derive_layout(layers, block_size=4, max_model_len=512)
    assert names(layout) == ["window-64", "window-64-2", "window-64-3", "window-64-4"]
    assert layout.pool_of_group == (0, 1, 2, 2)


def test_a_layer_that_reads_anothers_kv_owns_no_storage():
    layout = derive_layout([spec(0, 64), spec(1), spec(2, 64, producer=0)], block_size=4, max_model_len=512)
    assert layout.groups[0].layers == (0,)
    assert layout.place(2) == layout.place(0) == (0, 0)


def test_a_model_without_kv_has_no_group():
    layout = derive_layout([], block_size=16, max_model_len=512)
    assert (layout.num_groups, layout.num_pools) == (0, 0)


def test_an_unknown_layer_has_no_place():
    layout = derive_layout([spec(0)], block_size=16, max_model_len=512)
    with pytest.raises(KeyError):
        layout.place(7)


def test_reading_the_kv_of_a_layer_that_owns_none_is_refused():
    with pytest.raises(ValueError, match="layer 2: reads the KV of layer 1"):
        derive_layout([spec(0), spec(1, producer=0), spec(2, producer=1)], block_size=4, max_model_len=64)


@pytest.mark.parametrize(
    "wrong", [{"window": 0}, {"sinks": -1}, {"heads": 0}, {"dtype": "int16"}], ids=lambda d: next(iter(d))
)
def test_impossible_layers_are_refused(wrong):
    with pytest.raises(ValueError, match="layer 0"):
        spec(0, **wrong)
