"""`python -m bench.endpoint KIND CASE --port P`: a Python library behind llama-server's HTTP.

Only what the load generator needs: GET /health, and POST /completion without streaming. KIND:

- xllamacpp: its own server, which is llama-server's code in this process
- llama-cpp-python: one `Llama`, which takes one user at a time, behind a lock
"""

import argparse
import json
import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from pyllamabatch.compare.case import Case, ModelFile
from pyllamabatch.compare.completion import HOST

Complete = Callable[[dict[str, Any]], dict[str, Any]]
"""From a request's body to the answer's."""


def serve(complete: Complete, port: int) -> None:
    """Until the process is told to end."""

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def completion(request: Request) -> JSONResponse:
        body = await request.json()
        try:
            return JSONResponse(await run_in_threadpool(complete, body))
        except Exception as error:
            return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 500)

    routes = [Route("/health", health), Route("/completion", completion, methods=["POST"])]
    uvicorn.run(Starlette(routes=routes), host=HOST, port=port, log_level="warning")


def llama_cpp_python(case: Case, gpu: bool) -> Complete:
    import llama_cpp

    if gpu and not llama_cpp.llama_supports_gpu_offload():
        raise SystemExit("this build of llama-cpp-python does not use the GPU")
    model = llama_cpp.Llama(
        str(case.model.path),
        n_gpu_layers=case.n_gpu_layers,
        n_ctx=case.n_ctx // case.pl,
        n_batch=case.n_batch,
        n_ubatch=case.n_ubatch,
        n_threads=case.n_threads,
        n_threads_batch=case.n_threads,
        flash_attn=True,
        verbose=False,
    )
    turn = threading.Lock()

    def complete(body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        with turn:
            model.reset()
            model.set_seed(body["seed"])
            generated = model.generate(
                prompt,
                top_k=body["top_k"],
                top_p=body["top_p"],
                min_p=body["min_p"],
                temp=body["temperature"],
                repeat_penalty=1.0,
            )
            tokens = list(islice(generated, body["n_predict"]))
            text = model.detokenize(tokens).decode("utf-8", errors="replace")
        return {
            "content": text,
            "tokens_evaluated": len(prompt),
            "tokens_predicted": len(tokens),
        }

    return complete


def serve_xllamacpp(case: Case, gpu: bool, port: int) -> None:
    """Its own HTTP server, until the process ends."""
    import xllamacpp

    cpu = xllamacpp.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_CPU
    if gpu and all(device["type"] == cpu for device in xllamacpp.get_device_info()):
        raise SystemExit("this build of xllamacpp does not use the GPU")
    params = xllamacpp.CommonParams()
    params.model.path = str(case.model.path)
    params.hostnames = [HOST]
    params.port = port
    params.n_parallel = case.pl
    params.n_ctx = case.n_ctx
    params.n_batch = case.n_batch
    params.n_ubatch = case.n_ubatch
    params.n_gpu_layers = case.n_gpu_layers
    params.kv_unified = case.kv_unified
    params.cpuparams.n_threads = case.n_threads
    params.cpuparams_batch.n_threads = case.n_threads
    params.cache_prompt = False
    params.cache_ram_mib = 0
    params.n_ctx_checkpoints = 0
    params.fit_params = False
    server = xllamacpp.Server(params)
    print("listening on", server.listening_address, flush=True)
    threading.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.endpoint", description=__doc__)
    parser.add_argument("kind", choices=["xllamacpp", "llama-cpp-python"])
    parser.add_argument("case", help="its fields as JSON; of the model its path")
    parser.add_argument("--gpu", action="store_true", help="the library must use one")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    values = json.loads(options.case)
    case = Case(**values | {"model": ModelFile(Path(values["model"]))})
    if options.kind == "xllamacpp":
        serve_xllamacpp(case, options.gpu, options.port)
    serve(llama_cpp_python(case, options.gpu), options.port)


if __name__ == "__main__":
    main()
