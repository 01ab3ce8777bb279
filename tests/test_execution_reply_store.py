"""The ledger: a plan goes on from whatever an earlier run left on disk."""

from pathlib import Path

import numpy as np
import pytest
import torch

from raylarge import order, storage
from raylarge.errors import UserError
from raylarge.execution.reply_store import ReplyStore
from raylarge.sampling.plan import Plan, Request, run
from raylarge.sampling.tasks import Task

ORDER = order.parse({"size": 64})
TASK = Task(ORDER)
REQUESTS = [
    Request("draw/0", TASK),
    Request("draw/1", TASK),
    Request("guide", TASK, {"tokens": "draw/0"}),
    Request("windows/0/0", TASK, {"tokens": "draw/1", "target": "guide"}),
    Request("windows/0/10", TASK, {"latents": "windows/0/0", "target": "guide"}),
    Request("decode/0", TASK, {"latents": ("windows/0/10",)}),
]


def new_plan():
    return Plan(REQUESTS, ["decode/0", "guide"], opened)


def opened(kept, open_):
    return [np.asarray(open_(one)) for one in kept]


def answer(task, **inputs):
    values = [*inputs.pop("latents", ())] if "target" not in inputs else []
    values += inputs.values()
    return sum(map(torch.as_tensor, values), torch.zeros(2, 3)) * 1.5 + 1


class StoppedError(Exception):
    pass


def stopped_after(count, ledger, plan=None):
    """Run a plan that is killed right after its n-th reply was kept."""
    plan = plan or new_plan()
    ledger.resume(plan)

    def watch(now):
        if len(now.snapshot().finished) == count:
            raise StoppedError

    with pytest.raises(StoppedError):
        run(plan, answer, watch)
    return plan


def resumed(root, bundle="weights"):
    """Run again; the result, and how many requests were answered for it."""
    ledger, plan, asked = ReplyStore(root, ORDER, bundle), new_plan(), []
    found = ledger.resume(plan)

    def counted(task, **inputs):
        asked.append(task)
        return answer(task, **inputs)

    made = run(plan, counted)
    assert len(asked) == len(REQUESTS) - found
    return made, len(asked)


@pytest.fixture
def root(tmp_path):
    return str(tmp_path)


@pytest.mark.parametrize("count", range(1, len(REQUESTS)))
def test_a_run_goes_on_wherever_it_stopped(root, count):
    stopped_after(count, ReplyStore(root, ORDER, "weights"))
    made, asked = resumed(root)
    assert asked == len(REQUESTS) - count
    for now, then in zip(made, run(new_plan(), answer), strict=True):
        np.testing.assert_array_equal(now, then)


def test_what_has_had_its_use_takes_no_room(root):
    ledger = ReplyStore(root, ORDER, "weights")
    plan = stopped_after(5, ledger)
    sizes = {path.name: path.stat().st_size for path in Path(ledger.folder).iterdir()}
    assert len(sizes) == 5
    full = {name for name, size in sizes.items() if size}
    assert full == {id.replace("/", "-") for id in plan.snapshot().replies}
    assert full == {"guide", "windows-0-10"}


def test_a_reply_that_was_lost_is_asked_for_again_with_all_it_takes(root):
    ledger = ReplyStore(root, ORDER, "weights")
    stopped_after(5, ledger)
    Path(ledger.folder, "guide").unlink()
    made, asked = resumed(root)
    assert asked == 3  # draw/0, guide, decode/0; windows/0/10 is still there
    np.testing.assert_array_equal(made[0], run(new_plan(), answer)[0])


def test_another_order_or_bundle_begins_anew(root):
    stopped_after(4, ReplyStore(root, ORDER, "weights"))
    assert ReplyStore(root, ORDER, "others").resume(new_plan()) == 0
    other = order.parse({"size": 64, "seed": 1})
    assert ReplyStore(root, other, "weights").resume(new_plan()) == 0
    assert ReplyStore(root, ORDER, "weights").resume(new_plan()) == 4


def each(kept, open_):
    return [open_(one) for one in kept]


def test_types_come_back_as_they_went(root):
    replies = {
        "draw/0": torch.randn(2, 3).to(torch.bfloat16),
        "draw/1": np.arange(12, dtype=np.uint8).reshape(2, 2, 3)[:, ::-1],
        "guide": torch.randn(3, 2).T,
    }
    requests = [Request(id, TASK) for id in replies]
    ledger, plan = ReplyStore(root, ORDER, "weights"), Plan(requests, list(replies), each)
    ledger.resume(plan)
    for id, reply in replies.items():
        plan.feed(id, reply)
    back = Plan(requests, list(replies), each)
    assert ReplyStore(root, ORDER, "weights").resume(back) == 3
    for then, now in zip(replies.values(), back.result, strict=True):
        assert type(now) is type(then)
        assert now.dtype == then.dtype
        np.testing.assert_array_equal(
            torch.as_tensor(now).float(),
            torch.as_tensor(then.copy() if isinstance(then, np.ndarray) else then).float(),
        )


def test_a_damaged_file_is_named(root):
    ledger = ReplyStore(root, ORDER, "weights")
    stopped_after(3, ledger)
    Path(ledger.folder, "guide").write_bytes(b"not a tensor at all")
    with pytest.raises(UserError, match=r"guide is damaged; remove its folder"):
        resumed(root)


def test_a_removed_ledger_leaves_nothing(root):
    ledger = ReplyStore(root, ORDER, "weights")
    ledger.remove()
    stopped_after(3, ledger)
    ledger.remove()
    assert list(Path(root).iterdir()) == []
    assert ReplyStore(root, ORDER, "weights").resume(new_plan()) == 0


@pytest.mark.s3
def test_a_ledger_may_lie_in_a_bucket(s3_bucket):
    root = storage.join(s3_bucket, "orders")
    stopped_after(4, ReplyStore(root, ORDER, "weights"))
    assert resumed(root)[1] == 2
    ledger = ReplyStore(root, ORDER, "weights")
    ledger.remove()
    assert ledger.resume(new_plan()) == 0
