"""``align plan`` and ``align run`` as functions, which call the same functions of the pipeline as the verbs."""

from __future__ import annotations

from alignment.api.call_surroundings import Recipe, console_of, errors_explained, name_of, raise_if_stopped
from alignment.api.loaded_run import Run, load_run
from alignment.api.override_words import Overrides, words
from alignment.api.run_plan import RunPlan, described
from alignment.core.errors import Preempted
from alignment.costs.devices import THIS
from alignment.pipeline.execute import planned_costs
from alignment.pipeline.execute.run import run_with_advice
from alignment.pipeline.execute.signals import Terminated, termination_raises
from alignment.pipeline.plan.plan import make_plan


def plan(
    recipe: Recipe,
    overrides: Overrides = (),
    *,
    cost: bool = False,
    trade: bool = False,
    device: str = THIS,
    verify: bool = False,
    quiet: bool = False,
) -> RunPlan:
    """What ``run`` would do, and why; trains nothing. The command is ``align plan``.

    ``recipe`` is the name of a shipped recipe, or the path of a .yaml file. ``overrides`` are texts
    (``"stages.dpo.beta=0.3"``) or a mapping (``{"stages.dpo.beta": 0.3}``). With ``cost`` or another ``device``,
    the plan says what the stages would need on ``device``, and with ``trade``, what every way of training them would
    need; that takes half a minute or more for each stage. Otherwise it has the cost that was estimated before, if any.
    With ``verify``, results to reuse are read and compared with their hashes; without, their sizes are compared.

    Raises:
        ConfigError, DataError, ModelError: a fault in the recipe, the overrides, a data file or a model.
        ArtifactError: a manifest cannot be read, or an artifact of a folder that the recipe names is damaged.
        StageError: the cost cannot be estimated.
        Preempted: a signal asked for a stop while the cost was estimated.
    """
    cost = planned_costs.is_wanted(cost=cost, device=device)
    with errors_explained():
        checked = planned_costs.checked_plan(
            name_of(recipe), words(overrides), cost=cost, trade=trade, device=device, verified=verify
        )
        if not (cost or trade):
            return described(checked, planned_costs.known(checked))
        console = console_of(quiet=quiet)
        try:
            with termination_raises():
                estimated = planned_costs.estimated(checked, device=device, trade=trade, announce=console.print)
        except Terminated as stop:
            raise Preempted("the estimate was asked to stop", where=checked.config.name) from stop
        return described(checked, estimated)


def run(
    recipe: Recipe,
    overrides: Overrides = (),
    *,
    stage: str | None = None,
    wait: bool = False,
    verify: bool = False,
    quiet: bool = False,
) -> Run:
    """Plans a recipe, runs what has to run, and returns the run. The command is ``align run``.

    ``recipe``, ``overrides`` and ``verify`` are those of ``plan``. ``stage`` names the only stage to run, from results
    of earlier ones. With ``wait``, a result that another process works on is waited for. Progress is printed to
    standard output unless ``quiet``.

    Raises:
        AlignmentError: as for ``plan``; and StageError, DiskError, NonFiniteError, RewardError if a stage fails; Busy
            if another process works on the run; GateNotMet if the results do not meet a gate. Finished results stay.
        KeyboardInterrupt: Ctrl-C, or the interrupted kernel of a notebook; the stage has saved.
        Preempted: another signal asked the run to stop; the stage has saved.
    """
    with errors_explained():
        planned = make_plan(name_of(recipe), words(overrides), verified=verify)
        code = run_with_advice(planned, console=console_of(quiet=quiet), only=stage, wait=wait)
        raise_if_stopped(code, planned.config.name)
        return load_run(planned.run_folder)
