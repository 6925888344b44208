"""Where a training step's time goes, by layer and operator.

    python notebooks/tools/profile_step.py --norm group
    python notebooks/tools/profile_step.py --arch residual --norm batch group --out profile.json

XLA names its operators after the lines of our program that they came from; JAX's profiler times
them. On a CPU operators run side by side, so that their times can add up to more than a step's.
"""

import collections
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import cyclopts

from jaxnorm.analysis.tables import Table
from jaxnorm.bench.__main__ import describe_machine, measure_ceiling, save
from jaxnorm.bench.worker import Job

STEPS = 5


@dataclass(frozen=True)
class Profile:
    """Milliseconds a step of each (layer, direction, operator), and of a step on the clock."""

    job: Job
    step_milliseconds: float
    operators: dict[tuple[str, str, str], float]


def profile(job: Job) -> Profile:
    """Profiles a few warm training steps of our own side of a benchmark."""
    import jax

    from jaxnorm.bench.worker import jax_setup
    from jaxnorm.training.epoch import train_nets
    from jaxnorm.training.mesh import use_all_cores

    use_all_cores()
    program, mesh, state, call = jax_setup(job)
    rest = (*call, job.batch_size, 0, 0, STEPS)
    text = train_nets.lower(program, mesh, state, *rest).compile().as_text()
    for _ in range(2):
        clock = time.perf_counter()
        state, done = train_nets(program, mesh, state, *rest)
        jax.block_until_ready(done)
        seconds = time.perf_counter() - clock
    origins = {name: origin_of(line) for name, line in instructions_of(text or "").items()}
    operators: collections.Counter[tuple[str, str, str]] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(train_nets(program, mesh, state, *rest))
        (trace,) = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
            for line in plane.lines:
                for event in line.events:
                    if event.name in origins:
                        operators[origins[event.name]] += event.duration_ns / 1e6 / STEPS
    return Profile(job, seconds / STEPS * 1e3, dict(operators))


def instructions_of(hlo: str) -> dict[str, str]:
    """The lines of a compiled program by the name of what they compute, loops left out."""
    matches = re.finditer(r"^ *(?:ROOT )?%?([\w.-]+) = (.*)$", hlo, re.MULTILINE)
    return {match[1]: match[2] for match in matches if " while(" not in match[2]}


def origin_of(instruction: str) -> tuple[str, str, str]:
    """The layer, the direction and the operator that a line of a compiled program comes from."""
    name = re.search(r'op_name="([^"]*)"', instruction)
    path = name[1] if name else ""
    layer = re.search(r"\b([Cc]\d+(?:_norm)?)\b", path)
    kinds = {
        "convolution": r" convolution\(|/conv_general_dilated$",
        "matrix product": r"/dot_general$",
        "transpose": r"/transpose$",
        "pad": r"/pad$",
        "sum": r"/reduce_sum$|reduce-window",
        "dropout and ReLU": r"_dropout_relu",
        "update": r"/(?:add|mul|sub)$",
    }
    kind = next(
        (kind for kind, form in kinds.items() if re.search(form, instruction[:60] + path)), "other"
    )
    direction = "backward" if "transpose(" in path else "forward" if "jvp(" in path else ""
    return layer[1] if layer else "", direction, kind


def render(profile: Profile, lines: int = 30) -> str:
    """The operators that take longest, as a table for a person."""
    job = profile.job
    total = sum(profile.operators.values())
    head = (
        f"{job.arch} {job.norm}, batch {job.batch_size}: {profile.step_milliseconds:.1f} ms a "
        f"step, {total:.1f} ms in its operators"
    )
    rows = sorted(profile.operators.items(), key=lambda item: -item[1])[:lines]
    table = [
        f"{milliseconds:8.2f} ms  {layer:<9} {direction:<9} {kind}"
        for (layer, direction, kind), milliseconds in rows
    ]
    return "\n".join([head, *table])


def kinds(profile: Profile) -> dict[str, Any]:
    """What of a profile is written: milliseconds a step on the clock, and of each operator."""
    total: collections.Counter[str] = collections.Counter()
    for (_, _, kind), milliseconds in profile.operators.items():
        total[kind] += milliseconds
    return {"clock": profile.step_milliseconds, "operators": dict(total.most_common())}


def table(values: Mapping[str, Any]) -> Table:
    """Written profiles as a table: a column a norm, its operators' work and its time."""
    profiles, machine = values["profiles"], values["machine"]
    names = list(
        dict.fromkeys(kind for profile in profiles.values() for kind in profile["operators"])
    )
    rows = [
        [kind, *(f"{profile['operators'].get(kind, 0):.1f}" for profile in profiles.values())]
        for kind in names
    ]
    work = [sum(profile["operators"].values()) for profile in profiles.values()]
    rows.append(["all operators", *(f"{total:.1f}" for total in work)])
    rows.append(
        ["a step on the clock", *(f"{profile['clock']:.1f}" for profile in profiles.values())]
    )
    note = (
        f"Milliseconds of work of all {machine['cores']} cores in a step of the "
        f"{values['arch']} net, batch {values['batch_size']}; {machine['processor']}; "
        f"{machine['when'][:10]}."
    )
    return Table("Profile", ["operator", *profiles], rows, note)


def main(
    norm: Annotated[tuple[str, ...], cyclopts.Parameter(consume_multiple=True)] = ("batch",),
    arch: str = "original",
    batch_size: int = 128,
    out: Path | None = None,
) -> None:
    """Prints the profile of a training step of each norm's net, and writes what a table needs."""
    profiles = {}
    for name in norm:
        profiled = profile(Job("jaxnorm", name, arch, batch_size))
        print(render(profiled) + "\n")
        profiles[name] = kinds(profiled)
    if out:
        machine = describe_machine(measure_ceiling())
        values = {"machine": machine, "arch": arch, "batch_size": batch_size, "profiles": profiles}
        save(out, values)


if __name__ == "__main__":
    cyclopts.run(main)
