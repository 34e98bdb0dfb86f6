"""llama.cpp's own server, as the package xllamacpp carries it: llama_cpp_server.py GGUF PORT THREADS AT_ONCE LENGTH."""

import signal
import sys

import xllamacpp

path, port, threads, at_once, length = sys.argv[1], *map(int, sys.argv[2:])
params = xllamacpp.CommonParams()
params.model.path = path
params.hostnames, params.port = ["127.0.0.1"], port
params.n_parallel, params.n_ctx = at_once, at_once * length
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
signal.pause()
