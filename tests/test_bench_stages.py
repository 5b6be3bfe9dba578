"""The stage table: every kernel of a decode step finds its layer, in the text of a program as XLA writes it."""

import dataclasses

import pytest
from tiny import TINY

from ds4jax.bench.device_time import Event
from ds4jax.bench.stages import Stages, loop_kernels
from ds4jax.errors import DeviceError

CONFIG = dataclasses.replace(
    TINY,
    num_hidden_layers=3,
    compress_ratios=(0, 128, 4),
    swiglu_limit=(10.0,) * 4,
    swiglu_limit_shared=(10.0,) * 4,
)


def fusion(name, path, first=None):
    known = f' deduplicated_name="{first}"' if first else ""
    return f'  %{name} = f32[1]{{0}} fusion(%a, %b), kind=kLoop, calls=%f, metadata={{op_name="{path}"{known}}}'


def triton(number, name, path, code):
    return (
        f"  %pallas_call.{number} = (f32[1,32]{{1,0}}, f32[1]{{0}}) custom-call(%a), "
        f'custom_call_target="__gpu$xla.gpu.triton", metadata={{op_name="jit(run)/while/body/M/{path}/pallas_call"}}, '
        f'backend_config={{grid_x = 1 : i32, ir = "{code} name = \\22no\\22", name = "{name}", num_stages = 1 : i32}}'
    )


BODY = [
    "  %arg = (s32[]) parameter(0)",
    fusion("loop_add_fusion", "jit(run)/while/body/add"),
    triton(1, "embed", "M._embedded/M.op/jit(_run)/embed", "E"),
    triton(2, "norm", "layers_0/layers_0.normed/layers_0.op/jit(_run)/norm", "N"),
    triton(3, "linear", "layers_0/attn/attn.project/attn.linears/attn.op/jit(_run)/linear", "L1"),
    triton(4, "linear", "layers_0/attn/attn.output/attn.linear/attn.op/jit(_run)/linear", "L2"),
    fusion("wrapped_add.1", "jit(run)/while/body/M/layers_0/moe/add"),
    triton(5, "norm", "layers_1/layers_1.normed/layers_1.op/jit(_run)/norm", "N"),
    triton(6, "linear", "layers_1/attn/compressor/compressor.linears/compressor.op/jit(_run)/linear", "L3"),
    triton(7, "linear", "layers_1/attn/attn.output/attn.linear/attn.op/jit(_run)/linear", "L2"),
    fusion("wrapped_add.2", "jit(run)/while/body/M/layers_1/moe/add"),
    fusion("loop_select_fusion.4", "jit(run)/while/body/M/layers_2/moe/moe.route/jit(_take)/select_n"),
    fusion("loop_select_fusion", "jit(run)/while/body/M/layers_1/moe/moe.route/jit(_take)/select_n", "same"),
    fusion("loop_select_fusion.3", "jit(run)/while/body/M/layers_0/moe/moe.route/jit(_take)/select_n", "same"),
    "  ROOT %tuple = (s32[]) tuple(%arg)",
]
TEXT = "\n".join(
    [
        "HloModule jit_run, is_scheduled=true",
        "%wrapped_add_computation (p: f32[1]) -> f32[1] {",
        fusion("not_of_the_loop", "jit(run)/add"),
        "}",
        "",
        "%region_0.99 (arg: (s32[])) -> (s32[]) {",
        *BODY,
        "}",
        "",
        "ENTRY %main.101 (p: f32[1]) -> f32[1] {",
        '  %while.1 = (s32[]) while(%tuple.1), condition=%region_1.1, body=%region_0.99, metadata={op_name="while"}',
        "}",
    ]
)
STEP = [
    *("loop_add_fusion", "embed", "norm", "linear", "linear__1", "wrapped_add_1"),
    *("norm", "linear__2", "linear__1", "wrapped_add_2"),
    *("loop_select_fusion_4", "loop_select_fusion", "loop_select_fusion"),
]
STEPS = 4


def events(step=STEP):
    """Two microseconds each, one after another; the loop's condition runs before every step and after the last."""
    names = ["MemcpyD2D", *(name for _ in range(STEPS) for name in ["wrapped_compare", *step]), "wrapped_compare"]
    return [Event(100.0 + 3 * index, 2.0, name) for index, name in enumerate(names)]


def found(events):
    stages = Stages.of(loop_kernels(TEXT), events, STEPS, CONFIG, 1, 2048).stages
    return {(stage.kind, stage.place, stage.kernel): stage.per_step for stage in stages}


def test_names_of_the_kernels_of_a_program():
    """Equal kernels share the first one's name, others of a name are numbered."""
    assert [name for name, _ in loop_kernels(TEXT)] == STEP


def test_every_kernel_finds_its_layer():
    assert found(events()) == {
        ("outside layers", "loop", "loop_add_fusion"): 1,
        ("outside layers", "M._embedded", "embed"): 1,
        ("window", "layer", "norm"): 1,
        ("window", "attn.project", "linear"): 1,
        ("window", "attn.output", "linear__1"): 1,
        ("window", "moe", "wrapped_add_1"): 1,
        ("window", "moe.route", "loop_select_fusion"): 1,
        ("HCA", "layer", "norm"): 1,
        ("HCA", "attn/compressor", "linear__2"): 1,
        ("HCA", "attn.output", "linear__1"): 1,
        ("HCA", "moe", "wrapped_add_2"): 1,
        ("HCA", "moe.route", "loop_select_fusion"): 1,
        ("CSA", "moe.route", "loop_select_fusion_4"): 1,
        ("other", "", "wrapped_compare"): 0.75,  # between steps
    }


def test_branches_may_change_places():
    """Kernels of different names may start in any order."""
    changed = [*STEP[:3], STEP[4], STEP[3], *STEP[5:]]
    assert found(events(changed)) == found(events())


def test_other_numbers():
    """Where the program's text misses that kernels are equal, their order tells their places."""
    step = [name.replace("wrapped_add_2", "wrapped_add_1") for name in STEP]
    assert found(events(step))["HCA", "moe", "wrapped_add_1"] == 1
    step = [name.replace("linear__2", "linear__7") for name in STEP]
    assert found(events(step))["HCA", "attn/compressor", "linear__7"] == 1


def test_what_is_not_in_the_program_is_told():
    step = [*STEP, "norm"]
    assert {key: n for key, n in found(events(step)).items() if key[2] == "norm"} == {("other", "", "norm"): 3}


def test_sums():
    """A kernel that runs beside others is busy with them, not after them."""
    beside = [Event(event.start - 1.5, 2.0, event.name) if event.name == "embed" else event for event in events()]
    plain, step = (Stages.of(loop_kernels(TEXT), list_, STEPS, CONFIG, 3, 2048) for list_ in (events(), sorted(beside)))
    kernels = STEPS * (1 + len(STEP)) - 1
    assert plain.total == plain.busy == step.total == 2.0 * kernels / STEPS
    assert sum(stage.microseconds for stage in step.stages) == pytest.approx(step.total)
    assert sum(stage.percent for stage in step.stages) == pytest.approx(100)
    assert step.span == (3.0 * kernels - 1) / STEPS
    assert step.busy == plain.busy - 0.5
    (embed,) = (stage for stage in step.stages if stage.kernel == "embed")
    assert (embed.microseconds, embed.alone) == (2.0, 1.5)
    assert sum(stage.alone for stage in step.stages) == pytest.approx(step.busy - 0.5)
    text = str(step)
    assert text.startswith(f"rows 3, context 2048: {kernels / STEPS:.0f} kernels in {step.total:.0f} us per step")
    assert "window 5 in 10 us (1 layers of 5.0 in 10.0 us)" in text and "outside layers 2 in 4 us" in text


def test_a_program_without_a_loop():
    with pytest.raises(DeviceError, match="expected a compiled program with a loop"):
        loop_kernels(TEXT.replace(" while(", " call("))
