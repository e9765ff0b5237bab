"""What a run would take, told without its devices: `plan.json` in the run folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from bc2exp.config.hardware import HardwareConfig
from bc2exp.config.parallelism import AXES, degrees, micro_batch_of
from bc2exp.config.root import Config
from bc2exp.config.task import PlanConfig, PretrainConfig
from bc2exp.hardware import HOST, get_backend, planning_ops
from bc2exp.parallel.mesh import Mesh
from bc2exp.parallel.world import World
from bc2exp.plan import search
from bc2exp.plan.estimate import Rates, assumptions
from bc2exp.plan.memory import laid_out
from bc2exp.plan.planner import Choice, Plan, Planner
from bc2exp.plan.trace import alone
from bc2exp.storage import atomic
from bc2exp.tasks import build
from bc2exp.text.tokenizer import Tokenizer, find_tokenizer
from bc2exp.tracking.journal import Journal, NullJournal


def plan(config: Config, folder: Path, world: World, journal: Journal | NullJournal) -> str:
    """Plan the configured run; leaves `plan.json` in `folder`."""
    task = config.task
    assert isinstance(task, PlanConfig)
    planner, chosen = make_planner(config, journal), make_choice(config)
    rates, memory = planner.rates, config.hardware.memory_gib
    budget = None if memory is None else memory * 2**30 * (1 - task.reserve)
    own = planner.plan(chosen, exact=True)
    check_parts(planner, own, config.hardware.num_devices)
    others = []
    if task.alternatives:
        hardware = config.hardware
        per_node = hardware.devices_per_node or hardware.num_devices
        found = list(search.choices(planner, hardware.num_devices, per_node, chosen.defer_reduction))
        plans = search.ranked(planner, found, budget)
        if budget is not None and own.memory.total > budget:
            plans = search.nearest_that_fit(plans, chosen, budget)
        others = [each for each in plans if search.distance(chosen, each.choice)][: task.alternatives]
    report = {
        "model": config.model.name,
        "hardware": config.hardware.name,
        "recipe": task.recipe,
        "num_devices": config.hardware.num_devices,
        "global_batch": task.global_batch,
        "sequence_length": config.dataset.sequence_length,
        "memory_gib": memory,
        "reserve": task.reserve,
        "fits": None if budget is None else own.memory.total <= budget,
        "peak_name": config.hardware.peak_name,
        "assumptions": [
            "memory on the rank that needs most, every position labelled, documents not separated",
            "not in it, as it is the host's: checkpoints written beside the training (task.save_beside) keep "
            f"a copy of {(own.memory.parameters + own.memory.optimizer) / 2**30:.2f} GiB a rank",
            *(
                assumptions(rates, config.hardware.num_devices)
                if rates
                else ["no rates are declared for this hardware: no time"]
            ),
        ],
        "plan": as_data(own, planner, chosen),
        "alternatives": [as_data(each, planner, chosen) for each in others],
    }
    atomic.write_json(folder / "plan.json", report)
    values = {f"plan/{key}_gib": value / 2**30 for key, value in asdict(own.memory).items()}
    journal.metrics(0, {**values, **({"plan/step_s": own.time.step} if own.time else {})})
    return "done"


def make_planner(config: Config, journal: Journal | NullJournal) -> Planner:
    """A planner for the model, the batch and the devices of the configuration."""
    model, task = config.model, config.task
    assert isinstance(task, (PlanConfig, PretrainConfig))
    vocab_size = model.vocab_size
    if vocab_size is None:
        tokenizer = Tokenizer(find_tokenizer(model.tokenizer, model.weights))
        vocab_size = build.find_vocabulary(model, tokenizer, journal)
    shape = build.make_model(model, vocab_size, planning_ops(config.hardware.backend.value)).shape
    return Planner(
        shape=shape,
        backend=config.hardware.backend.value,
        precision=config.hardware.precision.value,
        length=config.dataset.sequence_length,
        global_batch=task.global_batch,
        rates=make_rates(config.hardware),
        twins=build.twins(config.hardware),
    )


def make_rates(hardware: HardwareConfig) -> Rates | None:
    """The declared rates; None where one that is needed is not declared."""
    peak, link = hardware.peak_tflops, hardware.link_gb_s
    per_node = hardware.devices_per_node or hardware.num_devices
    network = hardware.network_gb_s if hardware.num_devices > per_node else (hardware.network_gb_s or link)
    if hardware.num_devices == 1:
        link = network = link or 1.0  # nothing is exchanged
    if peak is None or link is None or network is None:
        return None
    return Rates(peak, hardware.efficiency, link, network, per_node, hardware.link_per_pair)


def make_choice(config: Config) -> Choice:
    """The configured layout and micro batch."""
    layout, task = config.parallelism, config.task
    assert isinstance(task, (PlanConfig, PretrainConfig))
    sizes = degrees({axis: getattr(layout, axis) for axis in AXES}, config.hardware.num_devices)
    share = task.global_batch // (sizes["replicate"] * sizes["shard"])
    return Choice(
        **sizes,
        zero_stage=layout.zero_stage,
        sequence_parallel=layout.sequence_parallel and sizes["tensor"] > 1,
        recompute=layout.recompute.value,
        defer_reduction=layout.defer_reduction,
        micro_batch=task.micro_batch or micro_batch_of(share, sizes["pipeline"]),
    )


def check_parts(planner: Planner, plan: Plan, size: int) -> None:
    """Lay the model out in earnest, as the rank of the plan, and compare."""
    choice = plan.choice
    rank = plan.stage * size // choice.pipeline
    with alone(rank, size):
        world = World(rank, size, 0, 1, get_backend(HOST))
        mesh = Mesh(world, choice.pipeline, choice.replicate, choice.shard, choice.tensor)
        real = laid_out(
            planner.shape,
            planner.ops,
            mesh,
            planner.precision,
            zero_stage=choice.zero_stage,
            sequence_parallel=choice.sequence_parallel,
        )
        assert real == planner.parts(mesh)[0], "the plan's parts are not those of the layout"


def as_data(plan: Plan, planner: Planner, chosen: Choice) -> dict[str, Any]:
    """A plan as JSON holds it; bytes, seconds, operations of a device in a step."""
    found = {
        "words": search.words(plan.choice, chosen),
        "choice": asdict(plan.choice),
        "num_micro_batches": plan.num_micro_batches,
        "stage": plan.stage,
        "memory": {**asdict(plan.memory), "total": plan.memory.total},
        "flops": plan.flops,
        "useful_flops": plan.useful_flops,
        "exchanges": [asdict(exchange) for exchange in plan.exchanges],
        "time": None,
    }
    if plan.time is not None:
        tokens = planner.global_batch * planner.length
        devices = plan.choice.pipeline * plan.choice.num_data_ranks * plan.choice.tensor
        found["time"] = {
            **asdict(plan.time),
            "step": plan.time.step,
            "tokens_per_s_per_device": tokens / plan.time.step / devices,
        }
    return found
