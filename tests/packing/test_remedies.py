"""What an error tells a user to do works as it is written: for what is read, and for what is written."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tricomm
from tricomm import ArgumentError, LocalTransport, Mesh, Replicate, Shard, ShardingSpec, SpecError

ONE = Mesh([0], ("x",))
WHOLE = ShardingSpec(ONE, (Replicate(),), (4, 4), "float32")
ROWS = ShardingSpec(ONE, (Shard(0),))
PLAN = tricomm.make_plan(WHOLE, ROWS)
FULL = torch.arange(16.0).reshape(4, 4)


class Tagged(torch.Tensor):
    """A subclass with memory of its own."""


# What a user holds, and what the remedy must be.
NOT_PLAIN: dict[str, tuple[Callable[[], Any], str]] = {
    "coordinates": (FULL.to_sparse, "tensor.to_dense()"),
    "rows": (FULL.to_sparse_csr, "tensor.to_dense()"),
    "mkldnn": (FULL.to_mkldnn, "tensor.to_dense()"),
    "quantized": (lambda: torch.quantize_per_tensor(FULL, 1.0, 0, torch.quint8), "tensor.dequantize()"),
    "nested": (lambda: torch.nested.nested_tensor(list(FULL)), "tensor.to_padded_tensor(0)"),
    "jagged": (lambda: torch.nested.nested_tensor(list(FULL), layout=torch.jagged), "tensor.to_padded_tensor(0)"),
    "subclass": (lambda: FULL.as_subclass(Tagged), "tensor.as_subclass(torch.Tensor)"),
}


@pytest.fixture(autouse=True, scope="module")
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def refused(call: Callable[[], Any], kind: type[Exception] = ArgumentError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    return str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NOT_PLAIN)
def test_the_remedy_for_a_tensor_that_is_not_plain_works(name: str) -> None:
    make, remedy = NOT_PLAIN[name]
    tensor = make()
    text = refused(lambda: LocalTransport().run(PLAN, {0: tensor}))
    assert f"pass {remedy}" in text, text
    assert torch.equal(LocalTransport().run(PLAN, {0: eval(remedy)})[0], FULL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_is_written_is_never_replaced_by_a_copy(name: str) -> None:
    """Of a copy the user would keep nothing."""
    tensor = NOT_PLAIN[name][0]()
    text = refused(lambda: tricomm.reshard(FULL, WHOLE, ROWS, out=tensor))
    assert "to_dense" not in text
    assert "torch.empty(...), or leave out=None" in text, text


@pytest.mark.parametrize(
    ("out", "told"),
    [
        (torch.zeros(4, 4).half(), r"pass one of dtype torch.float32, leave out=None, or change the destination's"),
        (torch.zeros(4, 3), r"pass one made by torch.empty\(spec.local_shape\(rank\), ...\), or leave out=None"),
        (torch.zeros(4, 4, device="meta"), r"a meta tensor has no data: pass one that was made on 'cpu'$"),
        (torch.zeros(4).expand(4, 4), r"pass a tensor without shared elements, as torch.empty\(...\), or leave out"),
    ],
)
def test_what_is_written_in_the_wrong_form_has_remedies_of_its_own(out: torch.Tensor, told: str) -> None:
    text = refused(lambda: tricomm.reshard(FULL, WHOLE, ROWS, out=out), SpecError)
    assert re.search(told, text), text
    assert ".to(" not in text


def test_the_dtype_of_out_may_be_that_of_the_destination() -> None:
    out = torch.zeros(4, 4).half()
    tricomm.reshard(FULL, WHOLE, ShardingSpec(ONE, (Shard(0),), dtype=out.dtype), out=out)
    assert torch.equal(out, FULL.half())


def test_what_is_no_tensor_has_a_remedy_that_works() -> None:
    given = FULL.numpy()
    assert "pass torch.as_tensor(...) of it" in refused(lambda: LocalTransport().run(PLAN, {0: given}))
    assert torch.equal(LocalTransport().run(PLAN, {0: torch.as_tensor(given)})[0], FULL)


def test_a_meta_tensor_is_refused_wherever_it_stands() -> None:
    """To move it first fails in torch, and no call works on the meta device."""
    two = tricomm.make_plan(
        ShardingSpec(Mesh([0, 1], ("x",)), (Shard(0),), (4, 4), "float32"), ShardingSpec(ONE, (Replicate(),))
    )
    for given in ({0: FULL[:2], 1: FULL[2:].to("meta")}, {0: FULL[:2].to("meta"), 1: FULL[2:]}):
        text = refused(lambda given=given: LocalTransport().run(two, given), SpecError)
        assert "is on meta" in text
        assert "a meta tensor has no data: pass one that was made on 'cpu'" in text
        assert "device=" not in text


class Tied(torch.nn.Module):
    """As small language models are: the last layer is the transpose of the first, in one memory."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(4, 4)
        self.head = torch.nn.Linear(4, 4, bias=False)
        self.head.weight = self.embed.weight
        torch.nn.init.constant_(self.embed.weight, value)


def without(names: dict[str, Any], text: str) -> dict[str, Any]:
    """What is left after the remedy of a text, as it is written there."""
    remedy = re.search(r"as in (\{.*?\}), and it has", text)
    assert remedy is not None, text
    left: dict[str, Any] = eval(remedy[1], {"state": names})
    return left


def test_the_remedy_for_tied_weights_works_as_it_is_written() -> None:
    """Nobody knows on the rank that writes whether both names get the same bytes, so they are refused."""
    trainer, server = Tied(3.0), Tied(0.0)
    source, destination = (dict.fromkeys(trainer.state_dict(), one) for one in (WHOLE, ROWS))
    mover = tricomm.Resharder(source, destination)
    text = refused(lambda: mover(trainer.state_dict(), out=server.state_dict()), SpecError)
    assert "out['embed.weight'] of rank 0 shares memory with out['head.weight']" in text
    mover = tricomm.Resharder(without(source, text), without(destination, text))
    mover(without(trainer.state_dict(), text), out=without(server.state_dict(), text))
    assert all(bool((weight == 3.0).all()) for weight in server.state_dict().values())


def test_what_is_read_and_written_has_another_remedy() -> None:
    mover = tricomm.Resharder({"w": WHOLE}, {"w": ROWS})
    weights = {"w": FULL.clone()}
    text = refused(lambda: mover(weights, out=weights), SpecError)
    assert text.endswith("apart from all else: pass another tensor, or leave out=None")


def test_a_module_is_taken_for_what_it_is() -> None:
    module = torch.nn.Linear(4, 4, bias=False)
    assert "pass one of its parameters, as module.weight.detach()" in refused(
        lambda: tricomm.reshard(module, WHOLE, ROWS)
    )
    assert torch.equal(tricomm.reshard(module.weight.detach(), WHOLE, ROWS), module.weight)
    mover = tricomm.Resharder({"weight": WHOLE}, {"weight": ROWS})
    assert refused(lambda: mover(module)).endswith("pass {name: tensor}, as its state_dict() is")
    assert refused(lambda: mover(module.named_parameters())).endswith("pass {name: tensor}, as dict(...) of it is")
    assert torch.equal(mover(module.state_dict())["weight"], module.weight)


def test_what_moves_says_what_it_is() -> None:
    mover = tricomm.Resharder(WHOLE, ROWS)
    layouts = "float32[4, 4] replicated over x on (x=1: rank 0) -> float32[4/x, 4] on (x=1: rank 0)"
    assert repr(mover) == f"<Resharder {layouts}: new>"
    handle = mover.start(FULL)
    handle.wait()
    assert repr(handle) == "<Handle: done>"
    assert repr(mover) == f"<Resharder {layouts}: connected>"
