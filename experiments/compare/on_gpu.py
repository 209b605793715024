"""compare_layouts on a GPU: the preset's true shape, timed with L2 cold."""

import jax
from rich.console import Console

from experiments.compare import byte_model, candidates, layers, output, read_ceiling, run, timing
from experiments.compare.environment import describe
from experiments.compare.routings import make_routings
from experiments.compare.settings import Settings

# Twice the L2 cache of an H100 or H200.
_COLD_BYTES = 100e6
_ACCURACY_ROUTINGS = 3


def compare(settings: Settings, console: Console) -> int:
    """Runs everything, prints the table, writes the JSONL and the PNG; returns how many failed."""
    device = jax.devices()[0]
    shapes = settings.shapes
    with output.progress(console) as bar:
        bar.start("read ceiling", 1)
        ceiling = read_ceiling.measure()
        bar.advance("read ceiling")
        for name, tbps in ceiling.all_tbps.items():
            bar.say(f"read of 4 GB, {name}: " + (f"{tbps:.3f} TB/s" if tbps else "failed"))
        environment = describe(
            seed=settings.seed,
            repeats=settings.repeats,
            commit=settings.commit,
            read_ceiling_tbps=ceiling.tbps,
        )
        layouts = candidates.make_layouts(
            settings.layouts, shapes, settings.out_dtype, interpret=False
        )
        baselines, left_out = candidates.make_baselines(settings.baselines, settings.out_dtype)
        for line in left_out:
            bar.say(line)
        memory = (device.memory_stats() or {}).get("bytes_limit")
        count = layers.num_layers(shapes, memory)
        bar.start("weights", count)
        weights = []
        for index in range(count):
            bar.advance(f"weights of layer {index + 1} of {count}")
            key = jax.random.fold_in(jax.random.key(settings.seed), index)
            weights.append(jax.block_until_ready(layers.make_layer(key, shapes)))
        _say_what_is_warm(settings, count, bar)
        plan = run.Plan(
            settings=settings,
            preset=settings.preset,
            shapes=shapes,
            tokens=settings.tokens,
            routing=settings.routing,
            layers=weights,
            candidates=candidates.expect_some([*layouts, *baselines], left_out),
            steps=timing.STEPS,
            accuracy_routings=_ACCURACY_ROUTINGS,
            ceiling_tbps=ceiling.tbps,
        )
        path = settings.result_path(environment.device, settings.preset, settings.routing, ".jsonl")
        save = output.saver(path, environment)
        bar.start("chains", len(plan.tokens) * len(plan.candidates))
        measurements = run.run(plan, bar.advance, bar.say, save)
        if settings.device_times:
            bar.start("device times", sum(m.chain_us is not None for m in measurements))
            run.run_device_times(plan, measurements, bar.advance, bar.say)
            save(measurements)
    console.print(
        f"{count} layers in rotation, {timing.STEPS} steps a program, each with its own routing; "
        f"read ceiling by {ceiling.by}",
        highlight=False,
    )
    return output.finish(console, path, environment, measurements)


def _say_what_is_warm(settings: Settings, num_layers: int, bar: output.Progress) -> None:
    warm = []
    for T in settings.tokens:
        routings = make_routings(settings.routing, settings.shapes, T, timing.STEPS, settings.seed)
        if byte_model.bytes_before_reuse(routings, num_layers, settings.shapes) < _COLD_BYTES:
            warm.append(T)
    if warm:
        bar.say(
            f"L2 is not cold at T = {', '.join(map(str, warm))}: an expert is read again after "
            f"less than {_COLD_BYTES / 1e6:.0f} MB, so times there may be below the floor"
        )
