"""What merges from S3 to S3 and from the Hub are held to: requests, memory, local disk."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from checkpoints import make_header, qwen2_layout
from merges import DARE_TIES, LINEAR, SLERP, TIES, Bench, Merge, weights
from processes import Usage, median
from reads import SCARCE, TOLERANCE, planned_nbytes
from report import Row, gib
from store_servers import merge_s3, run, serve, write_config  # makes `tests` known

from tests.servers.hub import HubServer
from tests.servers.static import OUTPUT

FAMILY = "qwen2-0.5b"
MAX_DISK_NBYTES = 50_000_000
SAMPLE_SECONDS = 0.05


def measure_requests(bench: Bench) -> list[Row]:
    """Return how many requests a model of 20,000 small tensors takes, in the order of layers, and of names."""
    return [_measure_requests(bench, is_sorted=is_sorted) for is_sorted in (True, False)]


def _measure_requests(bench: Bench, *, is_sorted: bool) -> Row:
    directory = bench.workdir / "many-tensors"
    shutil.rmtree(directory, ignore_errors=True)
    num_tensors = make_many_tensors([directory / "tune1", directory / "tune2"], is_sorted=is_sorted)
    merge = Merge("linear", weights=(0.6, 0.4))
    config = write_config(bench, merge, "many-tensors", ["tune1", "tune2"])
    with serve(bench, directory) as s3:
        usage = merge_s3(bench, s3, config)
        requests = Counter(request.path.split("/")[1] for request in s3.nginx.requests())
    most = max(requests["tune1"], requests["tune2"])
    nbytes = (directory / "tune1" / "model.safetensors").stat().st_size
    shutil.rmtree(directory)
    order = "names, as safetensors writes them" if is_sorted else "layers"
    return Row(
        f"requests per tensor, {num_tensors:,} neighbours in the order of {order}",
        "at most 0.2",
        f"{most / num_tensors:.4f}",
        most <= 0.2 * num_tensors,
        f"{most:,} requests of every kind, as nginx logged them, for one model of {nbytes / 1e6:.0f} MB"
        f" ({requests[OUTPUT]:,} for the output); {usage.wall:.1f} s wall, {usage.cpu:.1f} s CPU",
        {"requests": dict(requests)},
    )


def measure_bytes_served(bench: Bench) -> list[Row]:
    """Return the bytes of weights that the server sends in merges from S3, against the size of the inputs."""
    return [
        _measure_bytes_served(bench, merge, options, at_most)
        for options, at_most in (((), 1.0), (SCARCE, 1.1))
        for merge in (SLERP, TIES, DARE_TIES)
    ]


def _measure_bytes_served(bench: Bench, merge: Merge, options: Sequence[str], at_most: float) -> Row:
    bench.make_family(FAMILY, merge.num_tunes)
    paths = merge.inputs(bench.checkpoints, FAMILY)
    config = write_config(bench, merge, FAMILY, [path.name for path in paths])
    with serve(bench, bench.checkpoints / FAMILY) as s3:
        plan = bench.plan(config, f"s3://{OUTPUT}/merged", *options, env=s3.environment())
        num_before = len(s3.nginx.requests())
        usage = merge_s3(bench, s3, config, *options)
        sent = [
            request.nbytes
            for request in s3.nginx.requests()[num_before:]
            if request.method == "GET" and request.path.endswith(".safetensors") and OUTPUT not in request.path
        ]
    stored = sum(file.stat().st_size for file in weights(paths))
    ratio = sum(sent) / stored
    return Row(
        f"{' '.join([merge.method, 'from S3', *options])}: bytes served : bytes of the inputs",
        f"at most {at_most:.2f}",
        f"{ratio:.4f}",
        ratio < at_most + TOLERANCE,
        f"{sum(sent):,} bytes in {len(sent):,} answers, headers included, of {stored:,}, planned"
        f" {planned_nbytes(plan):,}; {usage.wall:.1f} s wall",
        {"sent": sum(sent), "planned": planned_nbytes(plan), "stored": stored},
    )


def make_many_tensors(paths: Sequence[Path], *, is_sorted: bool) -> int:
    """Write models of 20,000 tensors, all zeros and without space on disk; return how many it are exactly."""
    layout = qwen2_layout(vocab=1024, hidden=64, num_layers=1667, mlp=128, num_heads=1, num_kv_heads=1)
    names = sorted(layout.tensors) if is_sorted else list(layout.tensors)
    header = make_header(layout, names)
    for path in paths:
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(layout.config))
        with (path / "model.safetensors").open("wb") as file:
            file.write(header)
            file.truncate(len(header) + 2 * sum(math.prod(shape) for shape in layout.tensors.values()))
    return len(names)


def measure_store_memory(bench: Bench) -> list[Row]:
    """Return the peaks of ties with 8 fine-tunes and with 3, from S3 to S3 and on the local disk."""
    peaks: dict[tuple[int, str], int] = {}
    rows = []
    for num_tunes in (8, 3):
        merge = replace(TIES, weights=(1.0,) * num_tunes, densities=(0.5,) * num_tunes)
        local = bench.write_config(merge, FAMILY)
        paths = merge.inputs(bench.checkpoints, FAMILY)
        config = write_config(bench, merge, FAMILY, [path.name for path in paths])
        usages: dict[str, list[Usage]] = {"local": [], "S3": []}
        for _ in range(min(bench.repeats, 3)):
            usages["local"].append(bench.run_raymerge(local, "--memory", "1GiB", is_sampled=True))
            bench.clear(bench.raymerge_out)
            with serve(bench, bench.checkpoints / FAMILY) as s3:
                usages["S3"].append(merge_s3(bench, s3, config, "--memory", "1GiB", is_sampled=True))
        for where, found in usages.items():
            peaks[num_tunes, where] = max(max(usage.peak_rss, usage.tree_pss) for usage in found)
        walls = {where: median(found, lambda usage: usage.wall) for where, found in usages.items()}
        rows.append(
            Row(
                f"peak memory, ties with {num_tunes} fine-tunes and a base, --memory 1GiB, S3 to S3",
                "as local: at most 1.3 GiB",
                gib(peaks[num_tunes, "S3"]),
                peaks[num_tunes, "S3"] <= 1.3 * 2**30,
                f"local {gib(peaks[num_tunes, 'local'])}; sampled PSS of the process tree, or the largest ru_maxrss,"
                f" the largest of {len(usages['S3'])}; {walls['S3']:.1f} and {walls['local']:.1f} s wall",
                {where: [usage.to_json() for usage in found] for where, found in usages.items()},
            )
        )
    return rows


def measure_disk(bench: Bench) -> list[Row]:
    """Return how much local disk a merge of 1 GB from S3 to S3 uses; no file of its may be larger than that."""
    bench.make_family(FAMILY, 3)
    paths = LINEAR.inputs(bench.checkpoints, FAMILY)
    config = write_config(bench, LINEAR, FAMILY, [path.name for path in paths])
    with serve(bench, bench.checkpoints / FAMILY) as s3:
        watch = _DiskWatch(s3.home)
        try:
            merge_s3(bench, s3, config, max_nbytes=MAX_DISK_NBYTES)
        finally:
            watch.stop()
        written = sum(s3.sink.sizes().values())
    caused = json.loads((bench.workdir / "tree.json").read_text())["write_bytes"]
    used = max(watch.peak, caused)
    return [
        Row(
            "local disk, S3 to S3, linear (3)",
            "at most 50 MB for an output of 1 GB",
            f"{used / 1e6:.1f} MB",
            used <= MAX_DISK_NBYTES,
            f"output {written / 1e6:.0f} MB; {watch.peak / 1e6:.1f} MB at most in home, TMPDIR and working directory"
            f" (one and the same, sampled), {caused / 1e6:.1f} MB caused to be written anywhere (write_bytes of the"
            " process tree); RLIMIT_FSIZE 50 MB",
            {"peak": watch.peak, "write_bytes": caused},
        )
    ]


class _DiskWatch:
    """A thread that keeps the largest size of what is in a directory."""

    def __init__(self, directory: Path) -> None:
        self.peak = 0
        self._directory = directory
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            is_last = self._stopped.wait(SAMPLE_SECONDS)
            self.peak = max(self.peak, _disk_usage(self._directory))
            if is_last:
                return


def _disk_usage(directory: Path) -> int:
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                total += Path(parent, name).lstat().st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def measure_hub(bench: Bench) -> list[Row]:
    """Return how often the Hub is asked where a file is, in a merge of three repositories by two workers."""
    num_workers = 2
    paths = bench.make_family("small", 3)[1:]
    directory = bench.workdir / "hub"
    shutil.rmtree(directory, ignore_errors=True)
    home = bench.workdir / "home"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    with HubServer(directory) as hub:
        hub.add_token("hf_reader", user="me", can_read=["me"])
        config = json.loads(LINEAR.to_yaml(paths))
        for path, model in zip(paths, config["models"], strict=True):
            hub.create_repo(f"me/{path.name}", private=True)
            hub.upload(f"me/{path.name}", {file.name: file for file in path.iterdir()})
            model["model"] = f"hf://me/{path.name}"
        path = bench.workdir / "hub-linear.yml"
        path.write_text(json.dumps(config))
        env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_reader", "HF_HUB_OFFLINE": "0", "HOME": str(home)}
        hub.reset_requests()
        bench.clear(bench.raymerge_out)
        options = ["--workers", str(num_workers), "--memory", "256MiB", "--shard-size", "2MB"]
        command: list[str | Path] = [bench.raymerge, "merge", path, bench.raymerge_out, "-q", *options]
        run(bench, command, log="raymerge-hub", env=env, directory=home)
        resolved = Counter(request.path.partition("?")[0] for request in hub.requests if "/resolve/" in request.path)
        num_requests, num_ranges = len(hub.requests), len(hub.storage_requests)
    for left in (bench.raymerge_out, directory, home):
        bench.clear(left)
    asked = {name: count for name, count in resolved.items() if name.endswith(".safetensors")}
    most = max(asked.values())
    return [
        Row(
            "Hub: resolver requests per input file, linear (3)",
            f"at most 2 per worker: {2 * num_workers}",
            str(most),
            most <= 2 * num_workers,
            f"the most of {len(asked)} files, planning included, {num_workers} workers and their planner;"
            f" {num_requests} requests to the Hub in all, {num_ranges} to its storage",
            {"resolved": dict(resolved)},
        )
    ]
