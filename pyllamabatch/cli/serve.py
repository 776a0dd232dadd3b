"""Serve a model over HTTP: OpenAI's interface, llama-server's and Anthropic's.

  pyllamabatch serve -m FILE.gguf
  pyllamabatch serve -m FILE.gguf --replicas 2 --gpus-per-replica 1
  curl localhost:8080/v1/chat/completions -d '{"messages": [{"role": "user",
      "content": "Hello"}], "max_tokens": 32}'

It listens on loopback only, unless --host says otherwise. Give it a key then:
--api-key, or a file of keys, one a line. SIGTERM or Ctrl-C: new requests get
503, open ones are finished (--drain-timeout); a second one cuts them off."""

import argparse
import gc
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from pyllamabatch.cli.console import say
from pyllamabatch.cli.options import (
    add_model_arguments,
    add_policy_argument,
    add_sampling_arguments,
    add_shared,
    at_least,
    load_model,
    n_bytes,
    open_engine,
    positive,
    read_text,
    router_named,
    sampling_options,
)
from pyllamabatch.cluster.gpus import n_gpus
from pyllamabatch.engine.engine import Engine
from pyllamabatch.errors import ArgumentError, UnsupportedOperation
from pyllamabatch.llama.host import usable_cores
from pyllamabatch.llama.lora import LoraAdapter
from pyllamabatch.llama.model import Model
from pyllamabatch.scheduler.router import DEFAULT_ROUTER, ROUTERS

N_TRACE = 2048  # steps that the live page can look back on
# fmt: off


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    add("--port", type=at_least(0, 65535), default=8080, metavar="N",
        help="0 takes a free one (8080)")
    add("--alias", metavar="NAME", help="the model's name in answers (its file's)")
    add("--api-key", action="append", default=[], metavar="KEY", help="may be repeated")
    add("--api-key-file", type=Path, metavar="FILE", help="a key a line")
    add("--cors-origins", default="", metavar="LIST",
        help="pages of these origins may ask, comma separated; * for all, localhost for "
             "those of this machine (none)")
    add("--max-body", type=n_bytes, default="32Mi", metavar="SIZE",
        help="bytes of a request at most (32Mi)")
    add("--timeout", type=positive, metavar="S",
        help="seconds that a request may take, waiting included (no limit)")
    add("--drain-timeout", type=float, default=30.0, metavar="S",
        help="seconds that open requests get at the end (30)")
    add("--chat-template", metavar="NAME|FILE",
        help="instead of the model's: chatml, gemma, llama3, … or a file")
    add("--reasoning", choices=("on", "off", "auto"), default="auto",
        help="whether a template that can think does (auto: as it has it)")
    add("--embeddings", action="store_true", help="a second context for /v1/embeddings")
    add("--rerank", action="store_true", help="and for /rerank, with a reranker")
    add("--pooling", choices=("mean", "cls", "last"),
        help="of embeddings (the model's own, or mean)")
    for name in ("slots", "metrics", "page"):
        add(f"--no-{name}", action="store_true", help=f"without /{name if name != 'page' else ''}")
    add("-q", "--quiet", action="store_true", help="say nothing but errors")
    add_model_arguments(parser)
    add = parser.add_argument_group("engine").add_argument
    add("-np", "--parallel", type=at_least(1, 256), default=16, metavar="N",
        help="requests that run at once (16)")
    add("--max-waiting", type=at_least(1), default=1024, metavar="N",
        help="requests that wait for a slot; more get 429 (1024)")
    add("--machine", metavar="PROFILE",
        help="on a machine of which only this profile is there, a name or a file: it computes "
             "nothing and takes the time; no model writes the answers")
    add("--lora", action="append", default=[], metavar="[NAME=]FILE",
        help="an adapter that requests may name; may be repeated")
    add_shared(add, n_ctx=0, kv_unified=None, prefix_cache=None, speculate=None, n_batch=None,
               n_ubatch=None, threads=None, batch_invariant=None)
    add_policy_argument(add)
    add = parser.add_argument_group("several engines (extra `ray`)").add_argument
    add("--replicas", metavar="N|MIN-MAX", help="engines behind one address, on Ray Serve")
    add("--gpus-per-replica", type=float, default=0.0, metavar="N", help="or a share of one (0)")
    add("--router", default=DEFAULT_ROUTER, type=router_named, choices=tuple(ROUTERS),
        help=f"which of them gets a request ({DEFAULT_ROUTER})")
    add_sampling_arguments(parser, "For requests that don't say. In parentheses: the default.",
                           "each of them draws with this one", without=["logprobs"])


# fmt: on
def run(args: argparse.Namespace) -> int:
    with ExitStack() as stack:
        try:
            from pyllamabatch.server.run import Server, listen

            listening = stack.enter_context(listen(args.host, args.port))  # before a model's load
            if args.replicas is None:
                app: Any = stack.enter_context(opened(args))
                service = app.state.service
                name, what = service.model_name, service.about
                if args.machine:
                    what += f", no model: the profile {args.machine}"
            else:
                app = service = stack.enter_context(_fleet(args))
                name, what = args.alias or "fleet", f"{args.replicas} replicas"
        except ImportError as error:
            extra = "ray" if args.replicas else "server"
            what = f"{error.name} is missing: pip install 'pyllamabatch[{extra}]'"
            raise UnsupportedOperation(what) from None

        def ready() -> None:
            gc.collect()
            gc.freeze()  # a search for cycles in all that stays would hold up every stream
            if not args.quiet:
                say(f"{name}: {server.url}, {what}")

        server = Server(app, listening, ready, service)
        try:
            server.run_until_signal()
        finally:
            gc.unfreeze()  # what cycles hold is freed, too: Metal aborts at exit over a model left
        if not args.quiet:
            say("pyllamabatch: drained", sys.stderr)
    return 0


@contextmanager
def opened(args: argparse.Namespace, share: int | None = None) -> Iterator[Any]:
    """The application of a server over one engine, which is closed afterwards. `share`: of the
    cores, which others use, too; a model that a device computes needs none."""
    from pyllamabatch.server.app import create_app

    _show_errors()
    options = _options(args)  # what is wrong with them is said before a model is loaded
    with ExitStack() as stack:
        model = stack.enter_context(load_model(args, quiet=args.quiet))
        if args.threads is None and model.offloaded < 1:
            args.threads = share
        loras = _loras(model, args.lora, stack)
        engine = _engine(model, args, loras, stack)
        paths = {name: lora.path for name, lora in loras.items()}
        yield create_app(engine or model, replace(options, lora_paths=paths))


def application(flags: dict[str, Any]) -> Any:
    """For `serve run`: Ray Serve's application of these flags, {"model": FILE, "parallel": 64}. A
    flag that may be repeated takes a list, one without a value true or false; null is no flag."""
    from pyllamabatch.cluster.deploy import application as deployments

    parser = argparse.ArgumentParser(
        "serve run", exit_on_error=False, allow_abbrev=False, add_help=False
    )
    add_arguments(parser)
    words = (_words(name, value, parser._option_string_actions) for name, value in flags.items())
    args = parser.parse_args(list(chain.from_iterable(words)))
    return deployments(partial(opened, args), _fleet_options(args), _options(args))


def _words(name: str, value: Any, actions: Mapping[str, argparse.Action]) -> list[str]:
    """What a command line says for this flag of a file. ArgumentError for another value."""
    flag, no = f"--{name}", f"--no-{name}"
    action = actions.get(flag) or actions.get(no)
    if action is None:
        raise ArgumentError("flags", name, "is no flag of serve")
    if value is None:
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ArgumentError(name, value, "true or false")
        return [word for word in [flag if value else no] if word in actions]
    if isinstance(value, bool):  # YAML's on and off
        word = "on" if value else "off"
        if word not in (action.choices or ["off"] * (name == "speculate")):
            raise ArgumentError(name, value, "takes a value")
        value = word
    repeated = isinstance(action, argparse._AppendAction)
    values = value if repeated and isinstance(value, list) else [value]
    if any(isinstance(one, list | dict | bool | None) for one in values):
        raise ArgumentError(name, value, "a list of values" if repeated else "one value")
    return [f"{flag}={one}" for one in values]


def _show_errors() -> None:
    """What fails is logged to stderr, unless all is (--verbose)."""
    shown = logging.StreamHandler()
    shown.setLevel(logging.ERROR)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", handlers=[shown])


def _fleet(args: argparse.Namespace) -> Any:
    from pyllamabatch.cluster.deploy import running

    _show_errors()
    options, here = _fleet_options(args), not os.environ.get("RAY_ADDRESS")
    share = max(1, usable_cores() // options.max_replicas) if here else None
    own = argparse.Namespace(**{**vars(args), "quiet": True})
    return running(partial(opened, own, share), options, _options(args))


def _fleet_options(args: argparse.Namespace) -> Any:
    from pyllamabatch.cluster.deploy import FleetOptions

    options = FleetOptions.of(
        args.replicas or "1",
        gpus_per_replica=args.gpus_per_replica,
        router=args.router,
        n_seq_max=args.parallel,
        max_open=args.parallel + args.max_waiting,
    )
    if args.machine:
        return replace(options, n_gpus=n_gpus(options.max_replicas, args.gpus_per_replica))
    return options


def _options(args: argparse.Namespace) -> Any:
    from pyllamabatch.server.options import ServerOptions

    return ServerOptions(
        model_name=args.alias,
        api_keys=_keys(args),
        cors_origins=[one for word in args.cors_origins.split(",") if (one := word.strip())],
        sampling=sampling_options(args) | ({} if args.seed is None else {"seed": args.seed}),
        body_bytes_max=args.max_body,
        request_timeout=args.timeout,
        drain_timeout=args.drain_timeout,
        chat_template=_template(args.chat_template),
        thinking={"on": True, "off": False}.get(args.reasoning),
        embeddings=args.embeddings,
        rerank=args.rerank,
        pooling=args.pooling,
        slots=not args.no_slots,
        metrics=not args.no_metrics,
        page=not args.no_page,
    )


def _engine(
    model: Model, args: argparse.Namespace, loras: dict[str, LoraAdapter], stack: ExitStack
) -> Engine | None:
    """None for a model that makes embeddings only, where these were asked for."""
    options = {"n_trace": N_TRACE, "max_waiting": args.max_waiting, "loras": loras}
    options["machine"] = args.machine
    try:
        return stack.enter_context(open_engine(model, args, args.parallel, **options))
    except UnsupportedOperation:
        if args.embeddings or args.rerank:
            return None
        raise


def _keys(args: argparse.Namespace) -> list[str]:
    text = "" if args.api_key_file is None else read_text("--api-key-file", args.api_key_file)
    keys = [key.strip() for key in [*args.api_key, *text.splitlines()]]
    for name, value in (("--api-key", args.api_key), ("--api-key-file", args.api_key_file)):
        if value and not any(keys):  # a variable that is not set must not open a server
            raise ArgumentError(name, str(value), "has no key")
    keys.append(os.environ.get("PYLLAMABATCH_API_KEY", "").strip())
    return [key for key in keys if key]


def _template(given: str | None) -> str | None:
    if given is None or not Path(given).is_file():
        return given
    return read_text("--chat-template", Path(given))


def _loras(model: Model, given: list[str], stack: ExitStack) -> dict[str, LoraAdapter]:
    loras: dict[str, LoraAdapter] = {}
    for one in given:
        name, _, file = one.rpartition("=")
        name = name or Path(file).stem
        if name in loras:
            raise ArgumentError("--lora", one, "another adapter has this name already")
        loras[name] = stack.enter_context(LoraAdapter(model, file))
    return loras
