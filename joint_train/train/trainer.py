"""A run: the pair, its data, the training loop, and what it writes.

config → mesh → models → data → step → checkpoint, in this order, once from top to bottom.
"""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from joint_train.checkpoint import Checkpointer
from joint_train.config import Config, with_overrides
from joint_train.data import BatchLoader, OtherData, build_loader, loader_position
from joint_train.data.fit import check_fit
from joint_train.data.loader import check_sources
from joint_train.data.overview import overview
from joint_train.data.tokenizer import end_token_ids, load_tokenizer
from joint_train.distributed import parallelize
from joint_train.distributed.mesh import data_rank, init_distributed, init_mesh
from joint_train.distributed.preemption import Preemption
from joint_train.distributed.ranks import Ranks
from joint_train.errors import OutOfMemory, TooManyBadSteps
from joint_train.files import check_writable
from joint_train.model_card import model_cards
from joint_train.pair.attention import check_backward
from joint_train.pair.loss import run_budget_mb
from joint_train.pair.stats import JointStats
from joint_train.pair.targets import JointTargets, joint_targets, send
from joint_train.plan.planner import Machine, make_plan
from joint_train.train import advice
from joint_train.train.agreement import agree_on_configuration, agree_on_data
from joint_train.train.best import Best, load_best
from joint_train.train.diagnostics import BaseDrift, base_gradient_from_drafter
from joint_train.train.guards import BadSteps, LossSpikes, StepProfiler, Watchdog, dump, flight_recorder
from joint_train.train.length import is_due, run_steps
from joint_train.train.optim import build_optimizer, update
from joint_train.train.pace import Since, memory_gb, peak_memory, utilisation
from joint_train.train.stages import Stages
from joint_train.train.trackers import check_wandb
from joint_train.train.tracking import Tracker, metrics_from_json, metrics_to_json
from joint_train.train.validation import Validation
from joint_train.weights.average import averaged, start_average, update_average
from joint_train.weights.composite import load_pair
from joint_train.weights.folders import run_configs
from joint_train.weights.hub import Push
from joint_train.weights.placing import refuse_to_replace
from joint_train.weights.run_files import end_generation_with
from joint_train.weights.settle import with_adapter, with_vocabulary

log = logging.getLogger(__name__)


class Trainer:
    """Everything of a run, on one rank. Making it loads the pair and, with ``resume``, a checkpoint.

    Args:
        preemption: watches for the signals that stop a run, see :func:`run`.
    """

    def __init__(self, cfg: Config, preemption: Preemption) -> None:
        self.preemption = preemption
        self.output_dir = Path(cfg.output_dir).absolute()
        if torch.cuda.is_available():
            flight_recorder(self.output_dir)
        self.device = init_distributed(cfg.parallel.timeout_seconds)
        self.mesh = init_mesh(cfg.parallel)
        self.rank, self.ranks = data_rank(self.mesh)
        self.memory_at_start = peak_memory(self.device)
        torch.manual_seed(cfg.seed + self.rank)

        check_writable(self.output_dir, "output_dir")
        check_sources(cfg)
        if cfg.model.export.at_end:
            refuse_to_replace(self.output_dir / "export", (cfg.model.base, cfg.model.drafter), others=False)
        check_wandb(cfg.tracking, self.rank)
        check_backward(cfg.model.attn_implementation, self.device.type)
        cfg = with_adapter(cfg)
        advice.say_run(cfg, self.ranks, torch.cuda.get_device_name() if self.device.type == "cuda" else None)
        self.tokenizer = load_tokenizer(cfg)
        self.cfg = cfg = with_vocabulary(cfg, self.tokenizer)
        everyone = Ranks(cfg.parallel.timeout_seconds)
        agree_on_configuration(cfg, everyone)
        self.machine = machine = Machine(gpus=self.ranks, gpu_memory_gb=memory_gb(self.device, everyone))
        self.plan = make_plan(cfg, machine, self.device.type)
        advice.warn_of_memory(self.plan, machine)
        check_fit(cfg, self.tokenizer, *run_configs(cfg))
        self.model = load_pair(with_overrides(cfg, self.plan.chosen), self.mesh, self.device).train()
        self.optimizer = build_optimizer(self.model, cfg.optim, cfg.parallel.cpu_offload == "optimizer")
        if cfg.optim.drafter_ema:
            start_average(self.model)
        self.end_token_ids = end_token_ids(self.tokenizer, cfg.data.chat_template_kwargs)
        end_generation_with(self.model.base, self.end_token_ids)

        self.val_loader: BatchLoader | None = None
        self.drift: BaseDrift | None = None
        if cfg.data.val:
            self.val_loader = build_loader(cfg, self.tokenizer, "val", self.rank, self.ranks)
            agree_on_data(cfg, "val", self.val_loader, everyone)
        if cfg.tracking.diagnose_every:
            loader = self.build_train_loader(None) if self.val_loader is None else self.val_loader
            self.fixed_batch = self.prepare(next(iter(loader)), loader.source_names)
            self.drift = BaseDrift(self.model, *self.fixed_batch[:2])

        # After the pair, so that one that can't be loaded leaves no output_dir behind.
        self.checkpointer = Checkpointer(self.output_dir, cfg.checkpoint, timeout_seconds=cfg.parallel.timeout_seconds)
        self.push: Push | None = None
        position, bad_steps = None, 0
        found = self.checkpointer.resume(cfg.resume, self.model, self.optimizer, config=cfg)
        self.go_on_from(found and found[1])
        if found:
            path, saved = found
            position, bad_steps = saved["data"], saved.get("bad_steps", 0)
        self.loader = self.build_train_loader(position)
        agree_on_data(cfg, "train", self.loader, everyone)
        self.max_steps = run_steps(cfg, self.loader, self.ranks, self.step)
        self.best = Best(cfg.checkpoint.keep_best, cfg.eval.patience, saved.get("best") if found else None)
        self.last_step = min(self.max_steps, cfg.stop_after or self.max_steps)  # of this process
        self.stages = Stages(cfg, self.max_steps, self.plan, machine, self.device.type, found and found[1])
        if found:
            before = saved.get("max_steps"), saved.get("joint_steps")
            advice.say_resumed(cfg, path, self.step, (self.max_steps, self.stages.joint_steps), before)
        unfinished = self.unfinished is not None
        self.tracker = Tracker(cfg, self.rank, self.step, unfinished, self.max_steps, self.stages.work)
        if self.device.type == "cuda":
            self.model.loss_budget_mb = run_budget_mb(cfg.loss, "cuda", machine.usable - self.plan.peak)
        self.prompts = advice.generation_prompts(cfg.eval, cfg.parallel, self.plan, machine, self.device.type)
        self.validation: Validation | None = None
        if self.val_loader is not None:
            how = self.tokenizer, self.val_loader, self.prompts, (self.rank, self.ranks)
            self.validation = Validation(cfg, self.model, *how, saved.get("own_text") if found else None)
        advice.warn(cfg, self.plan, machine, self.device.type, (self.max_steps, self.stages.joint_steps))
        log.info("%s", overview({"train": self.loader, "val": self.val_loader}))
        left = self.stages.work(self.max_steps) - self.stages.work(self.step)
        advice.say_plan(self.plan, self.stages.peak, machine, self.device.type, left)
        self.profiler = StepProfiler(cfg.profile.steps, self.output_dir / "profile", self.rank)
        self.watchdog = Watchdog(cfg.parallel.timeout_seconds, self.rank)
        self.bad_steps = BadSteps(cfg.tracking.max_bad_steps, self.device, bad_steps)
        self.spikes = LossSpikes()
        self.since = Since(self.device)

    def go_on_from(self, saved: dict | None) -> None:
        """Where the run is, by the ``state`` of a checkpoint; at its beginning without one."""
        self.step = 0
        self.before: dict[str, float] | None = None  # what was validated before the first step, and last
        self.measured: dict[str, float] | None = None
        self.measured_at: int | None = None  # the step of what was measured last, if it was in this process
        self.unfinished: dict | None = None  # a validation that was interrupted: the step's metrics, and its kind
        if saved:
            self.step = saved["step"]
            self.before, self.measured = (metrics_from_json(saved[name]) for name in ("before", "measured"))
            self.unfinished = saved.get("unfinished")

    def build_train_loader(self, position: dict | None) -> BatchLoader:
        """The training data from a checkpoint's position; from the beginning if it isn't the data of the checkpoint."""
        try:
            return build_loader(self.cfg, self.tokenizer, "train", self.rank, self.ranks, position)
        except OtherData as error:
            log.warning("the data restarts from the beginning, and so do its epochs: %s", error)
            return build_loader(self.cfg, self.tokenizer, "train", self.rank, self.ranks)

    def train(self) -> None:
        """Run from the current step to the last one, or until the machine is taken away."""
        try:
            self.loop()
        except Exception:
            self.checkpointer.close()  # a save that is still being written is finished, whatever became of the step
            raise

    def loop(self) -> None:
        """The steps, and what happens between them."""
        cfg = self.cfg
        batches = iter(self.loader)
        self.checkpointer.restore_random_state()  # last: making an iterator draws from torch's generator
        with self.watchdog:
            with self.preemption.ends_at_once():
                self.first_validation()
            while self.step < self.last_step and not self.best.exhausted:
                self.watchdog.beat()
                with self.profiler.step(self.step + 1):
                    metrics = self.train_step(batches)
                last = self.step == self.last_step
                if is_due(self.step, cfg.tracking.diagnose_every):
                    metrics |= self.diagnose()
                self.checkpointer.poll()
                stop = self.preemption.should_stop()
                generate = is_due(self.step, cfg.eval.generate_every) or last
                if is_due(self.step, cfg.eval.every) or generate:
                    stop = stop or not self.validate(metrics, generate)
                    if stop and self.val_loader is not None:
                        self.unfinished = {"metrics": metrics_to_json(metrics), "generate": generate}
                    last = last or self.best.exhausted
                if metrics and not self.unfinished:
                    self.tracker.log(self.step, metrics)
                better = cfg.model.export.weights == "best" and self.best.step == self.step
                if stop or is_due(self.step, cfg.checkpoint.every) or last or better:
                    self.save(block=stop or last)
                if stop and (not last or self.unfinished):
                    self.close()
                    self.preemption.exit()
        if self.best.exhausted and self.step < self.last_step:
            advice.say_patience(self.best, self.step, self.max_steps)
        step, measured = self.step, self.measured
        if cfg.model.export.at_end:
            if cfg.model.export.weights == "best":
                step, measured = load_best(cfg, self.checkpointer, self.model, self.step)
            self.export(self.output_dir / "export", step, measured or {})
            self.publish(self.output_dir / "export")
        self.tracker.finish(self.before or {}, measured or {})
        peak, planned = (peak_memory(self.device) - self.memory_at_start) / 2**30, self.stages.peak / 2**30
        # On CPU that is the growth of the process, libraries' own buffers included, which no plan has.
        of_plan = f"; planned: {planned:.2f} GiB" if self.device.type == "cuda" else ""
        log.info("peak memory of rank 0: %.2f GiB%s", peak, of_plan)
        self.close()

    def first_validation(self) -> None:
        """What is measured before the first step: all of it in a new run, what was interrupted in a resumed one."""
        if self.before is None:
            self.measure(generate=True)
            self.before = self.measured
            self.tracker.log(self.step, self.before or {})
        elif self.unfinished is not None:
            metrics, generate = self.unfinished["metrics"], self.unfinished["generate"]
            measured = self.measure(generate)
            self.tracker.log(self.step, {k: float("nan") if x is None else x for k, x in metrics.items()} | measured)
            self.checkpointer.add_metrics(measured)
            self.unfinished = None

    def validate(self, metrics: dict[str, float], generate: bool) -> bool:
        """Add the validation's metrics to the step's; false if a signal interrupted it."""
        try:
            metrics |= self.measure(generate, self.check)
        except Interrupted:
            return False
        return True

    def measure(self, generate: bool, progress: Callable[[], None] | None = None) -> dict[str, float]:
        """:meth:`evaluate` this step; where patience is over, it is the run's last and generates."""
        measured = self.evaluate(generate, progress)
        self.best.observe(self.step, measured)
        if self.best.exhausted and not generate and self.prompts > 0:
            measured = self.evaluate(True, progress)
        self.measured, self.measured_at = measured, self.step
        return measured

    def check(self) -> None:
        """Between the parts of a validation: all ranks stop at the same one."""
        self.watchdog.beat()
        if self.preemption.should_stop():
            raise Interrupted

    def train_step(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, float]:
        """One optimizer step over ``grad_accum`` micro-batches; its metrics, or none in a step that doesn't log."""
        cfg, started = self.cfg, time.perf_counter()
        if self.step >= self.stages.joint_steps and not self.model.freeze_base_for_drafter:
            self.plan = self.stages.freeze(self.model, self.optimizer)
            advice.say_frozen(cfg, self.plan, self.step, (self.max_steps, self.stages.joint_steps))
        loaded = [next(batches) for _ in range(cfg.optim.grad_accum)]
        waited = time.perf_counter() - started
        micro_batches = [self.prepare(batch, self.loader.source_names) for batch in loaded]

        # All the counts are known before the first forward, so each loss is its share of the mean over the whole step.
        counts = send(torch.stack([counts for _, _, counts in micro_batches]).sum(0), self.device)
        dist.all_reduce(counts)
        weights = self.model.loss_weights(counts[:-1])

        self.optimizer.zero_grad()
        stats: JointStats | None = None  # until the first micro-batch, which every step has
        for i, (inputs, targets, _) in enumerate(micro_batches):
            parallelize.set_last_micro_batch(self.model, i == len(micro_batches) - 1)
            out = self.model(**inputs, targets=targets, weights=weights)
            out.loss.backward()
            stats = out.stats if stats is None else stats + out.stats
        factor, drafter_factor = self.stages.lr_factors(self.step, self.model.freeze_base_for_drafter)
        of_drafter = cfg.optim.drafter_max_grad_norm if cfg.optim.clip == "separate" else None
        norms = update(self.optimizer, self.model, cfg.optim.max_grad_norm, factor, of_drafter, drafter_factor)
        if cfg.optim.drafter_ema:
            update_average(self.model, cfg.optim.drafter_ema)
        self.bad_steps.observe(norms["grad_norm"].to(self.device))
        self.step += 1

        if not is_due(self.step, cfg.tracking.log_every) and self.step < self.last_step:
            self.since.add(counts[-1], waited, time.perf_counter() - started)
            return {}
        assert stats is not None
        means = stats.reduced(dist.all_reduce).means(self.loader.source_names, self.loader.source_adapters)
        metrics = means | self.bad_steps.read()
        if self.bad_steps.exhausted():
            dumped = [{**b, "rows": t.rows, "labels": t.labels} for b, t, _ in micro_batches]
            dumped = [{name: x for name, x in b.items() if isinstance(x, Tensor)} for b in dumped]
            folder = dump(self.output_dir, self.rank, self.step, dumped, self.model)
            raise TooManyBadSteps(
                f"{cfg.tracking.max_bad_steps} steps in a row had a loss or gradient that isn't finite "
                f"(tracking.max_bad_steps); weights are as before them, batches and norms are in {folder}"
            )
        metrics |= {name: norm.item() for name, norm in norms.items()}
        metrics["loss_spike"] = float(self.spikes.observe(metrics["base_loss"]))
        self.since.add(counts[-1], waited, time.perf_counter() - started)
        tokens, waited, seconds = self.since.read()
        if (epoch := self.loader.epoch) is not None:
            metrics["epoch"] = epoch
        return metrics | {
            "lr": cfg.optim.lr * factor,
            "drafter_lr": cfg.optim.drafter_lr * drafter_factor,
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_gpu": tokens / seconds / self.ranks,
            "seconds": seconds,
            "data_wait": waited,
            **utilisation(self.plan.flops / seconds, self.plan.recomputed / seconds, self.device),
            "memory_peak_gb": (peak_memory(self.device) - self.memory_at_start) / 2**30,
        }

    def prepare(self, batch: dict[str, Tensor], sources: list[str]) -> tuple[dict[str, Any], JointTargets, Tensor]:
        """Find a batch's targets while it is on the CPU, then send it to the device.

        Args:
            batch: from a loader with these ``sources``.

        Returns:
            What the model takes, the targets, and their counts with the number of tokens, ``[1 + K + 1]`` on the CPU.
        """
        cfg, documents = self.cfg.drafter, batch["document_ids"]
        targets = joint_targets(batch["labels"], documents, cfg.num_steps, cfg.pairing, cfg.prompt_rows)
        inputs = {name: x for name, x in batch.items() if name not in ("labels", "source")}
        if int(documents.max()) <= 1:
            del inputs["document_ids"]  # one document a row, padded on the right: no mask is needed
        if len(sources) > 1:
            inputs["groups"] = batch["source"].flatten()[targets.rows + 1]
        sent: dict[str, Any] = {name: send(x, self.device) for name, x in inputs.items()}
        sent["num_groups"] = len(sources)
        sent |= parallelize.look_up(self.model, batch["input_ids"], self.device)
        counts = torch.cat([targets.counts, (documents > 0).sum()[None]])
        return sent, targets.to(self.device), counts

    @torch.no_grad()
    def evaluate(self, generate: bool, progress: Callable[[], None] | None = None) -> dict[str, float]:
        """Validation losses and, with ``generate``, tokens per base forward in assisted generation.

        However long it takes as a whole, it isn't taken for a hang while batches and prompts get done. It leaves the
        random state alone: a validation that is repeated changes nothing.

        Args:
            progress: called before each batch and each forward of a generation; by default it only says that this
                isn't a hang.
        """
        if self.validation is None:
            return {}
        with averaged(self.model):
            measured, examples = self.validation.measure(generate, self.prepare, progress or self.watchdog.beat)
        if examples:
            self.tracker.examples(self.step, examples)
        self.watchdog.beat()
        return measured

    def diagnose(self) -> dict[str, float]:
        """What the drafter's loss does to the base, and how far the base has moved."""
        inputs, targets, _ = self.fixed_batch
        counts = targets.counts
        dist.all_reduce(counts)
        assert self.drift is not None, "made where it is asked for"
        measured = self.drift.measure()
        measured["grad_norm_base_from_drafter"] = base_gradient_from_drafter(self.model, inputs, targets, counts)
        parallelize.reshard(self.model)
        return measured

    def save(self, block: bool) -> None:
        """A checkpoint of the current step."""
        before, measured = (metrics_to_json(of or {}) for of in (self.before, self.measured))
        state = {
            "step": self.step,
            **self.stages.state(),
            "before": before,
            "measured": measured,
            **self.bad_steps.read(),
        }
        state |= {"data": loader_position(self.loader), "unfinished": self.unfinished, "best": self.best.state()}
        state["own_text"] = self.validation and self.validation.answers
        self.tracker.sync()
        metrics = self.measured if self.measured_at == self.step else None  # of other weights they say nothing
        self.checkpointer.save(
            self.step, self.model, self.optimizer, state, config=self.cfg, metrics=metrics, block=block
        )

    def export(self, folder: Path, step: int, measured: dict[str, float]) -> None:
        """Both models as Hugging Face folders, and what was measured of them."""
        export, sources = self.cfg.model.export, self.model.sources
        assert sources is not None, "the pair was loaded from folders"
        cards = model_cards(self.cfg, sources, step, self.before or {}, measured)
        self.model.save_pretrained(
            folder,
            tokenizer=self.tokenizer,
            max_shard_size=export.max_shard_size,
            kv_shared_weights=export.kv_shared_weights,
            end_token_ids=self.end_token_ids,
            cards=cards,
            drafter_last=export.drafter_last,
        )

    def publish(self, folder: Path) -> None:
        """Start uploading an export as configured."""
        self.checkpointer.upload(folder)
        self.tracker.exported(folder)
        export = self.cfg.model.export
        if export.push_to_hub and dist.get_rank() == 0:
            self.push = Push(folder, export.push_to_hub, export.private)

    def close(self) -> None:
        """Finish what is still being written, and uploads: after a signal within most of what is left of the grace."""
        left, wait = self.preemption.seconds_left(), float(self.cfg.checkpoint.upload_wait_seconds)
        until = time.monotonic() + (wait if left is None else min(0.8 * left, wait))
        self.checkpointer.close(until - time.monotonic())
        if self.push is not None:
            self.push.finish(max(until - time.monotonic(), 0.0))
        self.tracker.close()
        dist.barrier()
        dist.destroy_process_group()


class Interrupted(Exception):
    """A validation was given up because the run is to stop."""


def run(cfg: Config) -> None:
    """A whole run on this rank. A signal stops it cleanly, and at once where nothing is trained yet."""
    with Preemption(cfg.checkpoint.grace_seconds, cfg.parallel.timeout_seconds) as preemption:
        with preemption.ends_at_once():
            trainer = Trainer(cfg, preemption)
        try:
            trainer.train()
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(advice.out_of_memory(trainer.cfg, trainer.plan, trainer.machine, error)) from error
