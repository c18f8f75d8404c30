"""Runs in an environment with xllamacpp: llama.cpp's own server, with the options of ``llama-server`` that the commands
of this project have. Prints its address; its log goes to stderr. Ends with its standard input.
"""

import argparse
import sys

import xllamacpp


def main() -> None:
    top = argparse.ArgumentParser()
    top.add_argument("-m", "--model", required=True)
    top.add_argument("-md", "--model-draft")
    top.add_argument("--spec-type", choices=["draft-mtp"])
    top.add_argument("--spec-draft-n-max", type=int, default=3)
    top.add_argument("--metrics", action="store_true")
    top.add_argument("--jinja", action="store_true")
    top.add_argument("--host", default="127.0.0.1")
    top.add_argument("--port", type=int, default=0)
    top.add_argument("-c", "--ctx-size", type=int, default=2048)
    top.add_argument("-np", "--parallel", type=int, default=1)
    args = top.parse_args()

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = args.model, args.ctx_size * args.parallel, args.parallel
    params.n_gpu_layers, params.warmup, params.fit_params = 0, False, False
    params.use_jinja, params.endpoint_metrics = args.jinja, args.metrics
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_prompt, params.cache_ram_mib = False, 0
    params.verbosity = 10  # what the drafter drafted, and with which probability
    params.hostnames, params.port = [args.host], args.port
    if args.model_draft:
        draft = params.speculative.draft
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
        draft.mparams.path, draft.n_max, draft.n_gpu_layers = args.model_draft, args.spec_draft_n_max, 0
        draft.cpuparams.n_threads = draft.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
