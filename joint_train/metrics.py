"""The metrics of a run: what each is called and what it means."""

TARGET_METRICS = {
    "base_loss": "cross-entropy of the base, mean over the step's targets on all ranks",
    "base_accuracy": "share of targets that the base's most likely token hits",
    "drafter_loss": "the drafter's loss (`loss.drafter`), mean over those of its rounds that have targets",
    "drafter_loss_{k}": "that of round k, from 0",
    "drafter_ce": "the drafter's cross-entropy with the text's token, whatever it is trained on; mean as above",
    "drafter_ce_{k}": "cross-entropy of round k with the text's token",
    "drafter_targets_left_out": "share of the drafter's targets that decoding never visits (`drafter.prompt_rows`)",
    "agreement_{k}": "share of targets where round k's most likely token is the base's: greedy decoding accepts it",
    "acceptance_argmax_{k}": "chance that sampling (temperature 1) accepts round k's most likely token, p(argmax q)",
    "acceptance_sampled_{k}": "that for a draft which is a sample of q itself: the sum over tokens of min(p, q)",
    "accepted_length_expected": "1 + the expected number of drafts accepted in a row, teacher forced, greedy",
    "accepted_length_walked": "that over the rows where decoding would stop: it skips those inside an accepted run",
    "dense_{metric}": "agreement, acceptance or accepted length, if all tokens were candidates (ordered embeddings)",
    "centroid_hit_{k}": "share of targets whose centroid is among the top ones of round k (ordered embeddings)",
    "{source}/base_ce": "cross-entropy of the base on one source's targets, where there are several sources",
    "{source}/drafter_ce": "that of the drafter, all rounds together",
    "{source}/agreement": "share of its targets of the drafter where greedy decoding accepts it, all rounds together",
    "{source}/targets": "how many targets of it the step had",
    "adapter/{adapter}/{metric}": "these of all sources of one adapter (`model.adapters`)",
}
"""Those over a step's targets, from :meth:`joint_train.pair.stats.JointStats.means`; ``{k}`` is a round, from 0. A mean
over nothing is NaN, and null in metrics.jsonl."""

METRICS = {
    "step": "optimizer steps done",
    "time": "seconds since 1970 when the line was written",
    "epoch": "how many times the run has gone through its training data: documents so far over all there are",
    **TARGET_METRICS,
    "grad_norm": "L2 norm of the gradients of both models together, before clipping",
    "grad_norm_base": "that of the base alone",
    "grad_norm_drafter": "that of the drafter alone",
    "grad_norm_base_from_drafter": "of the base, from the drafter's loss alone (`tracking.diagnose_every`)",
    "base_drift": "|W - W_start| / |W_start| over all of the base's weights (`tracking.diagnose_every`)",
    "base_drift_kl": "KL of the base at the start from the base now, on a fixed batch (`tracking.diagnose_every`)",
    "lr": "learning rate of the base; 0 while it is frozen",
    "drafter_lr": "learning rate of the drafter",
    "tokens_per_second": "tokens (without padding) of all ranks over the seconds of the step",
    "tokens_per_second_per_gpu": "that over the number of ranks",
    "seconds": "of the step on rank 0",
    "data_wait": "seconds of it that rank 0 waited for its batches",
    "tflops_per_gpu": "FLOPs of the step (planned; recomputation counted) on a rank over its time, 10^12 a second",
    "hfu": "hardware FLOPs utilisation: that over what the GPU can do, where its kind is known",
    "mfu": "model FLOPs utilisation: the same without recomputation",
    "memory_peak_gb": "most memory allocated on rank 0's GPU so far, GiB; on CPU the growth of its process",
    "bad_steps": "steps skipped so far because their loss or gradient wasn't finite",
    "loss_spike": "1 where the loss is far above its recent past",
    "val/{metric}": "any of the losses above on the validation data",
    "val/tokens_per_forward": "tokens per base forward in assisted generation on validation prompts, the drafter shown "
    "what engines show it (with `drafter.rope_position=next_token` what transformers does)",
    "val/own_agreement_{k}": "agreement_{k} on what the base wrote in the last assisted generation (`eval.own_text`)",
    "val/own_accepted_length": "accepted_length_walked on that text: where decoding it would stop; it predicts "
    "tokens per base forward in serving at every validation",
    "val/adapter/{adapter}/tokens_per_forward": "that on the prompts of one adapter (`model.adapters`)",
}
"""Every metric's meaning."""

SUMMARY = {
    "val/base_loss": "base loss",
    "val/drafter_loss": "drafter loss",
    "val/drafter_ce": "drafter cross-entropy",
    "val/accepted_length_expected": "accepted length, expected",
    "val/own_accepted_length": "accepted length, own text",
    "val/tokens_per_forward": "tokens per base forward",
}
