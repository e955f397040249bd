"""A chain in DistributedDataParallel, on two real processes."""

from __future__ import annotations

import pytest

from tests.chain_helpers import distributed_gradients, error, joint_gradients
from tests.functions import assert_same
from tests.pool import Pool

CASE = f"{distributed_gradients.__module__}:{distributed_gradients.__name__}"


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_two_processes_have_the_gradients_of_the_joint_batch(
    two_ranks: Pool, micro_batches: int
) -> None:
    results = two_ranks.run(CASE, timeout=120, batch=6, micro_batches=micro_batches)
    # Slices as large as a rank's share: F sees equal shapes in both.
    wanted = joint_gradients(6, micro_batches, chunk_size=3)
    assert_same(results[0][0], results[1][0])
    for grads, failures, counts in results:
        assert failures == 0 and counts == {micro_batches}
        assert grads.keys() == wanted.keys()
        for name, grad in grads.items():
            assert error(grad, wanted[name]) < 1e-6, name
