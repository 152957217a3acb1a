"A recorder that is killed, a disk that fills, a recording that is played to a real socket: nothing that was safe is lost, and nothing is lost unseen"
import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
from websockets.asyncio.client import connect

from hftlab.core.errors import StoreError
from hftlab.data.capture import Recorder, files, replay
from hftlab.data.playback import serve
from hftlab.data.recordings import frames, load

ROOT = Path(__file__).parent.parent
REAL = ROOT/os.environ.get('HFTLAB_SHARED_DATA', '../shared/data')/'l2/usdm_btcusdt_20240808.gz'
T0 = 1_723_161_255_030_314_667


def frame(k: int) -> bytes: return b'{"stream":"btcusdt@trade","data":{"e":"trade","t":%d,"pad":"%b"}}' % (k, b'x'*(k*7919 % 400))


def made(n: int, gap_ns: int = 700_000) -> list[tuple[int, bytes]]: return [(T0 + k*gap_ns, frame(k)) for k in range(n)]


def burst(seconds: float) -> list[tuple[int, bytes]]:
    "The fullest stretch of the real recording, or as much of a made one"
    if not REAL.exists(): return made(int(seconds*2000), 500_000)
    r = load(REAL)
    counts = np.searchsorted(r.seen_ns, r.seen_ns + int(seconds*1e9)) - np.arange(len(r))
    at = int(counts.argmax())
    return [r[i] for i in range(at, at + int(counts[at]))]


def child(code: str, *args) -> subprocess.Popen:
    env = os.environ | {'PYTHONPATH': os.pathsep.join([str(ROOT/'tests'), str(ROOT)])}
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], stdout=PIPE, stderr=PIPE, env=env)


@pytest.mark.skipif(not REAL.exists(), reason='needs the recordings')
def test_a_real_recording_comes_back_byte_for_byte(tmp_path):
    given, got = list(frames(REAL)), []
    with Recorder(tmp_path, rotate_bytes=1 << 20) as r:
        for k, f in enumerate(given):
            assert r.on_frame(*f)
            if k % 10_000 == 0: r.sync()
    replay(frames(*files(tmp_path)), lambda *f: got.append(f), float('inf'))
    assert got == given and len(files(tmp_path)) == r.state.files > 2
    assert r.state.safe == len(given) and r.state.dropped == 0 and r.state.file_bytes == sum(p.stat().st_size for p in files(tmp_path))
    assert r.state.raw_bytes > 5*r.state.file_bytes


# Gives frames until it is killed, and says how many it gave and how many were promised to be safe.
GIVER = '''
import os, sys, time
from hftlab.data.capture import Recorder
from test_capture import T0, frame
r, k = Recorder(sys.argv[1], flush_s=.2, rotate_bytes=20_000), int(sys.argv[2])
while True:
    for _ in range(50): r.on_frame(T0 + k, frame(k)); k += 1
    if k % 1000 == 0: r.sync()
    os.write(1, b'%016d%016d%020d' % (k, r.state.safe, time.monotonic_ns()))
    time.sleep(.002)
'''


def test_killed_at_any_moment(tmp_path):
    draw, first = np.random.default_rng(5), 0
    for _ in range(5):
        p = child(GIVER, tmp_path, first)
        said = p.stdout.read(52)  # it lives
        end = time.monotonic() + .3 + draw.random()*.5
        while time.monotonic() < end: said += os.read(p.stdout.fileno(), 52_000)
        p.send_signal(signal.SIGKILL)
        rest, err = p.communicate()
        said += rest
        assert p.returncode == -signal.SIGKILL, err.decode()
        told = [(int(said[i:i+16]), int(said[i+16:i+32]), int(said[i+32:i+52])) for i in range(0, len(said) - 51, 52)]
        kept = list(frames(*files(tmp_path)))
        assert kept == [(T0 + k, frame(k)) for k in range(len(kept))]  # no hole, none twice, none torn
        assert len(kept) >= first + told[-1][1]  # what was safe is there
        old = [given for given, _, at in told if at < told[-1][2] - 1_200_000_000]
        assert len(kept) >= max(old, default=0)  # and what was given more than flush_s and a second ago, on a machine as busy as this
        first = len(kept)
    names = [p.name for p in files(tmp_path)]
    assert len(set(names)) == len(names) > 5


def test_a_file_cut_anywhere_gives_a_beginning(tmp_path):
    given = made(3000)
    r = Recorder(tmp_path/'a', flush_s=60)
    for i in range(0, 3000, 500):
        for f in given[i:i+500]: r.on_frame(*f)
        r.sync()
    whole = files(tmp_path/'a')[0].read_bytes()
    for at in np.random.default_rng(1).integers(0, len(whole), 60):
        (tmp_path/'cut').write_bytes(whole[:at])
        kept = list(frames(tmp_path/'cut'))
        assert kept == given[:len(kept)] and len(kept) >= 500*int(6*at/len(whole) - 1)
    r.close()


def test_restarts_in_one_second_and_hours_make_files(tmp_path):
    given = made(400, 60*10**9)  # 400 minutes
    for i in range(0, 400, 100):
        with Recorder(tmp_path) as r:
            for f in given[i:i+100]:
                r.on_frame(*f)
                if f[0] % (3600*10**9) < 60*10**9: r.sync()  # a group is written as one
    assert list(frames(*files(tmp_path))) == given
    with Recorder(tmp_path/'b') as one, Recorder(tmp_path/'b') as two:
        for r in (one, two): r.on_frame(*given[0])
    assert [p.name[:7] for p in files(tmp_path/'b')] == ['000001-', '000002-']


# The limit on the size of a file is what a disk that is full looks like from inside; it can be lifted again.
FULL = '''
import resource, sys
from hftlab.core.errors import StoreError
from hftlab.data.capture import Recorder, files
from hftlab.data.recordings import frames
from test_capture import T0, frame
def room(n): resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))
r, given, taken = Recorder(sys.argv[1], flush_s=.02, hold_bytes=150_000), 0, []
def give(n):
    global given
    for k in range(given, given + n):
        if r.on_frame(T0 + k, frame(k)): taken.append((T0 + k, frame(k)))
    given += n
give(300); r.sync()
for cycle in range(3):
    room(100 if cycle == 2 else files(sys.argv[1])[-1].stat().st_size + 40)
    give(400)
    try: r.sync(5)
    except StoreError as e: why = str(e)
    assert 'File too large' in why and 'frames must be written, were not' in why, why
    give(1000)
    assert r.state.dropped and r.state.why
    safe = r.state.safe
    kept = list(frames(*files(sys.argv[1])))  # perhaps with a beginning of what is just being tried
    assert len(kept) >= safe and kept == taken[:len(kept)], 'what was safe must stay whole'
    room(resource.RLIM_INFINITY)
    assert r.sync() == len(taken) == r.state.given - r.state.dropped and not r.state.why
    assert list(frames(*files(sys.argv[1]))) == taken
room(0)
give(10)
try: r.close()
except StoreError as e: print(e)
room(resource.RLIM_INFINITY)
assert list(frames(*files(sys.argv[1]))) == taken[:-10]
print(r.state.given, r.state.safe, r.state.dropped)
'''


def test_a_full_disk_is_said_counted_and_survived(tmp_path):
    out, err = child(FULL, tmp_path/'rec').communicate(timeout=60)
    lines = out.decode().splitlines()
    assert len(lines) == 2, err.decode()
    assert lines[0] == 'rec: 10 frames must be written, were not: the disk must take what is written, was: File too large'
    given, safe, dropped = map(int, lines[1].split())
    assert given == safe + dropped + 10 and dropped > 1000
    assert err.decode().count('have been dropped') == err.decode().count('frames wait\n') == 1  # once a minute


async def heard(url: str) -> list[tuple[float, bytes]]:
    async with connect(url, compression=None, max_size=None) as socket: return [(time.perf_counter(), text.encode()) async for text in socket]


@pytest.mark.parametrize('speed', [1, 10])
def test_a_burst_over_a_real_socket_loses_nothing(speed, tmp_path):
    given = burst(.2*speed)

    async def play():
        async with serve(given, speed=speed) as p: return await heard(p.url), p.pace.played()

    got, played = asyncio.run(play())
    assert [f for _, f in got] == [f for _, f in given] and played.frames == len(given)
    due = (np.array([ns for ns, _ in given]) - given[0][0])/1e9/speed
    late = np.array([at for at, _ in got]) - got[0][0] - due
    assert late.min() > -.02 and np.median(late) < .1  # the first frame may itself have been late
    assert played.late_p50_ms >= 0 and played.seconds >= due[-1]


def test_what_a_socket_gives_is_recorded_and_played_again(tmp_path):
    given = burst(1.)

    async def capture(folder, fed):
        async with serve(fed, speed=10) as p, connect(p.url, compression=None, max_size=None) as socket:
            with Recorder(folder, flush_s=.05) as r:
                async for text in socket: r.on_frame(time.time_ns(), text.encode())

    asyncio.run(capture(tmp_path/'a', given))
    asyncio.run(capture(tmp_path/'b', list(frames(*files(tmp_path/'a')))))
    assert [f for _, f in frames(*files(tmp_path/'b'))] == [f for _, f in given]


def test_spacing_is_kept():
    given, came = made(300, 5_000_000), []
    for speed in (5., 50.):
        came.clear()
        played = replay(given, lambda *_: came.append(time.perf_counter()), speed)
        late = np.array(came) - came[0] - np.arange(300)*.005/speed
        assert played.late_p50_ms < 5 and late.min() > -.05 and played.seconds >= 299*.005/speed


def test_a_recorder_that_cannot_begin_says_so(tmp_path):
    (tmp_path/'file').touch()
    with pytest.raises(StoreError, match='must be a folder that can be written'): Recorder(tmp_path/'file')


def test_streams_fed_by_a_recording_lose_nothing(tmp_path):
    from hftlab.core.settings import Stream
    from hftlab.data.streams import Streams
    given = [f for f in burst(6.) if f[1].startswith(b'{"stream":"') and b'@depth' not in f[1][:40]]  # no book: nothing to ask REST for
    names = {f[11:].partition(b'"')[0].decode() for _, f in given}

    async def run():
        got, lost = [], []
        async with serve(given, speed=10) as p:
            with Recorder(tmp_path, flush_s=.05) as r:
                async with asyncio.timeout(20), Streams(p.url, Stream(), lambda *f: (got.append(f), r.on_frame(*f)), lost.append) as s:
                    s.want(*names)
                    while len(got) < len(given): await asyncio.sleep(.01)
        return got, lost

    got, lost = asyncio.run(run())
    assert [f for _, f in got] == [f for _, f in given] and not lost
    assert list(frames(*files(tmp_path))) == got
