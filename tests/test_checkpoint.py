import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_embed_jax.checkpoint import Checkpoints
from moe_embed_jax.errors import UserError

PARAMS = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.ones(4)}}
OPTIMIZER = {"step": jnp.asarray(7), "mu": jnp.full((2, 3), 0.5)}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step in (3, 5, 7):
        checkpoints.save(step, {"spec": {"rows": step}}, params=PARAMS, optimizer=OPTIMIZER)
    checkpoints.wait()
    yield checkpoints
    checkpoints.close()


def test_round_trip_and_retention(saved):
    assert saved.latest_step() == 7
    assert sorted(int(p.name) for p in saved.folder.iterdir() if p.name.isdigit()) == [5, 7]
    assert saved.data(5) == {"spec": {"rows": 5}}
    restored = saved.restore(7, params=abstract(PARAMS), optimizer=abstract(OPTIMIZER))
    expected = {"params": PARAMS, "optimizer": OPTIMIZER}
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    assert saved.items(7) == {"params", "optimizer"}


def test_parameters_alone(saved):
    restored = saved.restore(7, params=abstract(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, restored, {"params": PARAMS})


def test_saving_a_step_again_changes_nothing(saved):
    saved.save(7, {}, params=jax.tree.map(jnp.zeros_like, PARAMS), optimizer=OPTIMIZER)
    saved.wait()
    restored = saved.restore(7, params=abstract(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, restored, {"params": PARAMS})


def test_other_architecture_is_named(saved):
    wrong = {"a": jnp.zeros((2, 4)), "b": PARAMS["b"]}
    with pytest.raises(UserError, match=r"params/a is \(2, 3\) there and \(2, 4\) in this config"):
        saved.restore(7, params=abstract(wrong))
    with pytest.raises(UserError, match=r"params/extra is None there and \(1,\)"):
        saved.restore(7, params=abstract(PARAMS | {"extra": jnp.zeros(1)}))


def test_unfinished_checkpoint_is_not_seen(saved):
    """What a kill leaves behind is a folder that Orbax has not renamed yet."""
    (saved.folder / "9.orbax-checkpoint-tmp-1").mkdir()
    assert Checkpoints(saved.folder).latest_step() == 7
