"What `run` promises, held by both engines: one class of promises, inherited by each"
import itertools
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from multiprocessing import active_children
from pathlib import Path
import cloudpickle
import numpy as np
import pytest
from hftlab.core.compute import gather, run
from hftlab.core.errors import Died, OutOfMemory, SettingsError, TaskError, TimedOut

cloudpickle.register_pickle_by_value(sys.modules[__name__]) # Ray's workers cannot import a test

def forever(log=None, child=False):
    if log: log.write_text(str(subprocess.Popen(['sleep', '1000']).pid if child else os.getpid()))
    while True: pass

def suicide(): os.kill(os.getpid(), signal.SIGKILL)
def nap(x, seconds=.01): return time.sleep(seconds) or x
def filled(n): return np.ones(n).sum()
def wrong(): raise KeyError('no such thing')
def bad_alloc(): # the C++ operator new throws through a caller that knows no exceptions, and the process aborts
    new = ctypes.CDLL('libstdc++.so.6')._Znwm
    new.argtypes,new.restype = [ctypes.c_size_t],ctypes.c_void_p
    return new(2**30)

def until(condition, seconds=15):
    "Wait until `condition()` holds, at most `seconds`"
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f'not within {seconds} s'
        time.sleep(.02)

def gone(pid):
    try: return 'State:\tZ' in open(f'/proc/{pid}/status').read()
    except (FileNotFoundError, ProcessLookupError): return True

def pid_of(result): return int(result.where.split('/')[1])
def by_index(results): return sorted(results, key=lambda r: r.index)

class Promises:
    "What every engine must do; `run` is a fixture that binds the engine"
    def test_every_task_has_one_result(self, run):
        results = by_index(run(partial(nap, x, .001*(x%3)) for x in range(200)))
        assert [(r.index, r.value, r.error, r.tries) for r in results] == [(x, x, None, 1) for x in range(200)]

    def test_results_come_as_tasks_end(self, run):
        results = run([partial(nap, 'slow', 60), partial(nap, 'quick')])
        assert next(results).value == 'quick'
        results.close()

    def test_time_out_kills(self, run, tmp_path):
        results = by_index(run([partial(forever, tmp_path/'pid'), partial(nap, 1)], timeout_s=2))
        assert isinstance(results[0].error, TimedOut) and 'must end within 2 s' in str(results[0].error)
        assert results[1].value == 1
        until(lambda: gone(int((tmp_path/'pid').read_text())))

    def test_memory_is_refused_and_the_worker_lives_on(self, run):
        tasks = [partial(np.ones, 2**26), partial(filled, 2**24), partial(bytearray, 2**29)]
        results = by_index(run(tasks, memory_mb=256))
        assert [type(r.error) for r in results] == [OutOfMemory, type(None), OutOfMemory]
        assert 'task 0 ones(67108864) must do with 256 MB' in str(results[0].error)
        assert results[1].value == 2**24

    def test_exception_travels(self, run):
        r, = run([wrong])
        assert type(r.error) is TaskError and 'task 0 wrong must not raise' in str(r.error)
        assert isinstance(r.error.__cause__, KeyError) and 'in wrong' in r.error.__cause__.__notes__[0]

    def test_killed_workers_lose_nothing(self, run):
        seen = []
        for r in run((partial(nap, x) for x in range(200)), retries=5):
            seen.append(r)
            if len(seen) in (10, 60, 110):
                with suppress(ProcessLookupError): os.kill(pid_of(r), signal.SIGKILL)
        assert [(r.value, r.error) for r in by_index(seen)] == [(x, None) for x in range(200)]

    def test_a_task_that_kills_its_worker_hurts_nobody(self, run):
        results = by_index(run([suicide, *(partial(nap, x) for x in range(1, 30))]))
        assert isinstance(results[0].error, Died) and results[0].tries == 2
        assert [r.value for r in results[1:]] == [*range(1, 30)]

    def test_leaving_early_kills(self, run, tmp_path):
        results = run([partial(forever, tmp_path/'pid'), partial(nap, 7, .5)])
        assert next(results).value == 7
        until((tmp_path/'pid').exists)
        results.close()
        until(lambda: gone(int((tmp_path/'pid').read_text())))

    def test_no_batch_in_a_batch(self, run):
        with pytest.raises(TaskError, match='make one flat batch'): gather(run([lambda: gather(run([int]))]))

    def test_libraries_have_one_thread(self, run):
        assert gather(run([lambda: os.environ['OMP_NUM_THREADS']])) == ['1']

class TestLocal(Promises):
    @pytest.fixture
    def run(self):
        yield partial(run, workers=2)
        until(lambda: not active_children())

    def test_abort_for_want_of_memory(self, run):
        results = by_index(run([bad_alloc, partial(nap, 1)], memory_mb=256))
        assert isinstance(results[0].error, OutOfMemory) and 'aborted' in str(results[0].error)
        assert results[1].value == 1

    def test_leftovers_are_not_blamed_on_the_next(self, run):
        def keep(): sys.kept = np.ones(2**24) # stays in its worker
        results = by_index(run([keep, partial(filled, 2**24), partial(filled, 2**25)], workers=1, memory_mb=192))
        assert [(type(r.error), r.tries) for r in results] == [(type(None), 1), (type(None), 2), (OutOfMemory, 2)]

    def test_children_of_a_task_die_with_it(self, run, tmp_path):
        r, = run([partial(forever, tmp_path/'pid', child=True)], timeout_s=2)
        assert isinstance(r.error, TimedOut)
        until(lambda: gone(int((tmp_path/'pid').read_text())))

    @pytest.mark.parametrize('code', [0, 3])
    def test_a_worker_that_leaves_is_missed(self, run, code):
        results = by_index(run([partial(os._exit, code), partial(nap, 1)]))
        assert isinstance(results[0].error, Died) and f'gone with exit code {code}' in str(results[0].error)
        assert results[1].value == 1

    def test_killing_at_any_moment_loses_nothing(self, run):
        "Workers start, idle, fetch, work and answer; `kill -9` may come at each moment"
        rng,seen = np.random.default_rng(1),[]
        for r in run((partial(bytes, 20_000) for _ in range(3000)), workers=3, retries=20):
            seen.append(r)
            if rng.random() < .01 and (crew := active_children()): crew[rng.integers(len(crew))].kill()
        assert sorted(r.index for r in seen) == [*range(3000)] and not [r.error for r in seen if r.error]

    def test_nobody_outlives_a_killed_parent(self, tmp_path):
        script = tmp_path/'parent.py'
        script.write_text(f"""
import os, time
from functools import partial
from pathlib import Path
from hftlab.core.compute import run
def stay(i):
    Path({str(tmp_path)!r}, str(i)).write_text(str(os.getpid()))
    time.sleep(1000)
if __name__ == '__main__': [*run((partial(stay, i) for i in range(2)), timeout_s=None, workers=2)]
""")
        parent,pids = subprocess.Popen([sys.executable, script]),[tmp_path/'0', tmp_path/'1']
        until(lambda: all(p.exists() and p.read_text() for p in pids))
        parent.kill()
        parent.wait()
        until(lambda: all(gone(int(p.read_text())) for p in pids))

    def test_unguarded_script_is_told(self, tmp_path):
        script = tmp_path/'bare.py'
        script.write_text('from hftlab.core.compute import gather, run\ngather(run([int]*50, workers=1))')
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and 'workers must be able to start, none did' in done.stderr.splitlines()[-1]

@pytest.fixture(scope='module')
def cluster():
    "A cluster of two nodes on this machine"
    pytest.importorskip('ray')
    from ray.cluster_utils import Cluster
    small = dict(num_cpus=2, object_store_memory=100 << 20)
    cluster = Cluster(initialize_head=True, head_node_args=small | dict(include_dashboard=False))
    cluster.small = small
    cluster.add_node(**small)
    yield cluster
    cluster.shutdown()

@pytest.fixture(scope='class')
def connected(cluster):
    import ray
    ray.init(cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()

def pull_the_plug(cluster, node):
    "End a node as a power cut would, with all its processes"
    raylet = node.all_processes['raylet'][0].process.pid
    crew = [int(pid) for p in Path(f'/proc/{raylet}/task').glob('*/children') for pid in p.read_text().split()]
    cluster.remove_node(node, allow_graceful=False)
    for pid in crew:
        with suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)

class TestRay(Promises):
    @pytest.fixture
    def run(self, connected): return partial(run, engine='ray', workers=2)

    def test_a_lost_node_loses_nothing(self, connected, tmp_path):
        import ray
        def here(x):
            node = ray.get_runtime_context().get_node_id()
            (tmp_path/str(x)).write_text(node)
            return nap(node, .2)
        node,seen,lost = connected.add_node(**connected.small),[],[]
        def calls(): # until the plug has been pulled, and a few more
            end,more = time.monotonic()+90,10
            for x in itertools.count():
                if time.monotonic() > end or not more: return
                if lost: more -= 1
                yield partial(here, x)
        for r in run(calls(), engine='ray', workers=6):
            seen.append(r)
            running = {int(p.name) for p in tmp_path.iterdir() if p.read_text() == node.node_id}
            running -= {r.index for r in seen}
            if running and not lost and len(seen) > 10:
                lost = sorted(running)
                pull_the_plug(connected, node)
        assert lost and [r.error for r in by_index(seen)] == [None]*len(seen)
        assert max(r.tries for r in seen if r.index in lost) == 2

    def test_another_cluster_is_refused(self, run):
        with pytest.raises(SettingsError, match='to which this process is connected, was 127.0.0.1:1'):
            gather(run([int], address='127.0.0.1:1'))

def test_ray_connects_and_leaves(cluster):
    import ray
    assert gather(run([partial(nap, x) for x in range(4)], engine='ray', address=cluster.address)) == [0, 1, 2, 3]
    assert not ray.is_initialized()

def test_ray_by_itself(tmp_path):
    "Ray is started here, ended afterwards, and says nothing"
    script = """
from hftlab.core.compute import *
print(gather(run([int, float], 'ray', workers=2)))
import ray
print(ray.is_initialized())"""
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, timeout=90)
    assert (done.stdout, done.stderr) == ('[0, 0.0]\nFalse\n', '')

def test_ray_where_nobody_answers():
    with socket.create_server(('127.0.0.1', 0)) as mute:
        address,began = f'127.0.0.1:{mute.getsockname()[1]}',time.monotonic()
        with pytest.raises(SettingsError, match=f'was {address}: timed out'): gather(run([int], 'ray', address=address))
    with pytest.raises(SettingsError, match=f'was {address}: .*refused'): gather(run([int], 'ray', address=address))
    assert time.monotonic() - began < 10

def test_ray_missing():
    script = 'import sys; sys.modules["ray"] = None\nfrom hftlab.core.compute import *\ngather(run([int], "ray"))'
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert 'pip install "hftlab[ray]"' in done.stderr.splitlines()[-1]
