"The journal under what a notebook cannot do to it: killed writers, torn and bent files, full disks, other processes"
import itertools, os, random, shutil, signal, subprocess, sys, threading, time
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE
import pytest, zstandard
from hftlab.core.errors import DataError, StoreError
from hftlab.core.journal import Journal, latest_snapshot, read_journal
from hftlab.core.segments import MARK, FILE, walk

def payload(seq:int)->bytes: return random.Random(seq).randbytes(seq*7919%9000)

# Writes until it is killed, and says on its standard output how far it was told that all is safe.
WRITER = '''
import os, random, sys
from hftlab.core.journal import Journal, latest_snapshot
from test_journal import payload
j = Journal(sys.argv[1], segment_bytes=1<<20)
while True:
    for _ in range(random.randrange(1, 100)): j.append(1000*(j.last+1), 7, payload(j.last+1))
    os.write(1, j.sync().to_bytes(8, 'little'))
    if random.random() < .05: j.snapshot(j.durable, b'%d' % j.durable)
'''

def child(code:str, *args, before:Sequence[str]=())->subprocess.Popen:
    env = os.environ | {'PYTHONPATH': os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])}
    return subprocess.Popen([*before, sys.executable, '-c', code, *map(str, args)], stdout=PIPE, stderr=PIPE, env=env)

def kill(p:subprocess.Popen)->bytes:
    "What it had still said"
    p.send_signal(signal.SIGKILL)
    out,err = p.communicate()
    assert p.returncode == -signal.SIGKILL, err.decode()
    return out

def acked(out:bytes)->int: return int.from_bytes(out[-8:], 'little')

def same(records, first:int)->int:
    "Check records from `first` on: order, time, bytes; the last sequence"
    seq = first-1
    for seq,r in enumerate(records, first): assert r == (seq, 1000*seq, 7, payload(seq))
    return seq

def test_killed_at_any_moment(tmp_path):
    checked = 0
    for i in range(24):
        p = child(WRITER, tmp_path)
        out = p.stdout.read(8)
        time.sleep(random.Random(i).random()*.1)  # the moment is what is drawn
        safe = acked(out + kill(p))
        with Journal(tmp_path, segment_bytes=1<<20) as j:
            assert j.last >= safe > checked
            assert (latest_snapshot(tmp_path) or (0, b''))[0] <= j.last
            checked = same(read_journal(tmp_path, checked+1), checked+1)
            assert checked == j.last
            j.append(1000*(j.last+1), 7, payload(j.last+1))
    assert same(read_journal(tmp_path), 1) == checked+1
    assert [p.suffix for p in sorted(tmp_path.glob('0*[tg]'))].count('.seg') == 1

DISK = set('__init__ _mark save close create put pack reopen _recover _save _roll _put_snapshot'.split())
FILES = {'segments.py', 'journal.py'}

def killed_at(k:int, folder:Path)->tuple[int,bool]:
    "Open, write three groups and close, killed at the `k`th line about the disk; what was safe, and if it was"
    said,say = os.pipe()
    if not (pid := os.fork()):
        lines = itertools.count(1)
        def trace(frame, event, arg):
            code = frame.f_code
            if code.co_name not in DISK or os.path.basename(code.co_filename) not in FILES: return None
            if event == 'line' and next(lines) == k: os.kill(os.getpid(), signal.SIGKILL)
            return trace
        threading.settrace(trace)
        sys.settrace(trace)
        with Journal(folder, segment_bytes=300, group_s=60) as j:
            for i in range(3):
                for _ in range(2): j.append(1000*(j.last+1), 7, payload(j.last+1)[:100])
                os.write(say, j.sync().to_bytes(8, 'little'))
                if i == 1: j.snapshot(j.durable, b'state')
        os._exit(0)
    os.close(say)
    status = os.waitpid(pid, 0)[1]
    with os.fdopen(said, 'rb') as f: safe = acked(f.read())
    assert status in (0, signal.SIGKILL)
    return safe, status != 0

def test_killed_at_every_line(tmp_path):
    with Journal(tmp_path/'0', segment_bytes=300) as j:
        for _ in range(3): j.sync(j.append(1000*(j.last+1), 7, payload(j.last+1)[:100]))
    with open(max((tmp_path/'0').glob('*.seg')), 'ab') as f: f.write(b'the beginning of a group')
    killed,k = True,0
    while killed:
        k += 1
        shutil.copytree(tmp_path/'0', tmp_path/'k')
        safe,killed = killed_at(k, tmp_path/'k')
        with Journal(tmp_path/'k', segment_bytes=300) as j:
            assert j.last >= max(3, safe)
            assert (latest_snapshot(tmp_path/'k') or (0,))[0] in (0, 7)
            j.append(1000*(j.last+1), 7, payload(j.last+1)[:100])
        assert [r[3] for r in read_journal(tmp_path/'k')] == [payload(i)[:100] for i in range(1, j.last+1)]
        shutil.rmtree(tmp_path/'k')
    assert safe == 9 and k > 100

def test_read_while_it_is_written(tmp_path):
    p = child(WRITER, tmp_path)
    p.stdout.read(8)
    with pytest.raises(StoreError, match='one writer'): Journal(tmp_path)
    last,deadline = 0,time.monotonic()+30
    while last < 3000 and time.monotonic() < deadline:
        now = same(read_journal(tmp_path, from_seq=max(1, last-500)), max(1, last-500))
        assert now >= last
        last = now
    assert last >= 3000 and next(read_journal(tmp_path, from_ns=1000*2000)).seq == 2000
    kill(p)

@pytest.fixture
def two_groups(tmp_path):
    "A closed journal of two groups, its segment, and where the second begins and ends"
    with Journal(tmp_path/'j', group_s=60) as j:
        for _ in range(2):
            for _ in range(3): j.append(1000*(j.last+1), 7, payload(j.last+1)[:40])
            j.sync()
    path = next((tmp_path/'j').glob('*.seg'))
    ends = [(end, r) for end,r in walk(path.read_bytes(), FILE.size, 1)]
    assert [r.kind == MARK for _,r in ends] == [True, False, False, False, True, False, False, False, True]
    return path, ends[4][0], ends[7][0]

def opened(path:Path, data:bytes)->tuple[int,int]:
    "Last record and bytes dropped when a journal with this last segment is opened; it has to go on afterwards"
    path.write_bytes(data)
    with Journal(path.parent, segment_bytes=1<<12) as j:
        last,dropped = j.last,j.dropped
        j.append(0, 1, b'goes on')
    records = list(read_journal(path.parent))
    assert [r.payload for r in records[:-1]] == [payload(i)[:40] for i in range(1, last+1)]
    assert records[-1] == (last+1, 0, 1, b'goes on')
    return last,dropped

def test_torn_at_every_byte(two_groups):
    path,begin,end = two_groups
    data = path.read_bytes()
    whole = [at for at,r in walk(data, FILE.size, 1) if begin <= at <= end]
    for cut in range(begin, end+1):
        kept = max(at for at in whole if at <= cut)
        for tail in (b'', bytes(1000)):
            last,dropped = opened(path, data[:cut]+tail)
            assert last == 3+whole.index(kept)
            assert dropped == len(data[kept:cut].rstrip(b'\0'))

def test_pages_that_arrive_out_of_order(two_groups):
    path,begin,end = two_groups
    data = path.read_bytes()
    hole = data[:begin] + bytes(50) + data[begin+50:]
    assert opened(path, hole[:end])[0] == 3
    path.write_bytes(hole)
    with pytest.raises(DataError, match=f'record 4 at offset {begin} must .* that it was safe'): Journal(path.parent)

def test_a_bit_in_what_was_safe(two_groups):
    path,begin,end = two_groups
    data = path.read_bytes()
    for at in range(end):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at%8]) + data[at+1:])
        for act in (Journal, lambda d: list(read_journal(d))):
            with pytest.raises((DataError, StoreError), match=path.name): act(path.parent)
    for at in range(end, len(data)):  # the last mark proves, and is proved by nothing; losing it loses no record
        assert opened(path, data[:at] + bytes([data[at] ^ 1 << at%8]) + data[at+1:])[0] == 6

def test_closing_is_cut_short(tmp_path):
    with Journal(tmp_path, segment_bytes=1<<12, group_s=60) as j:
        while j.last < 60: j.sync(j.append(1000*(j.last+1), 7, payload(j.last+1)))
    packed = sorted(tmp_path.glob('*.zst'))
    assert len(packed) > 4
    raw = [zstandard.ZstdDecompressor().decompress(p.read_bytes()) for p in packed]
    packed[0].with_suffix('.seg').write_bytes(raw[0]) # renamed, the raw one not yet removed
    packed[1].with_suffix('.seg').write_bytes(raw[1])
    packed[1].write_bytes(b'')                                       # a compressed one that nobody should trust
    packed[2].rename(packed[2].with_suffix('.seg')).write_bytes(raw[2]) # not yet compressed
    packed[3].with_name(packed[3].name+'.tmp').write_bytes(b'half')  # half written
    (tmp_path/f'{61:016}.seg.tmp').write_bytes(b'')                  # a successor without a name
    assert same(read_journal(tmp_path), 1) == 60
    with Journal(tmp_path, segment_bytes=1<<12) as j: assert j.last == 60
    assert same(read_journal(tmp_path), 1) == 60
    assert not list(tmp_path.glob('*.tmp')) and len(list(tmp_path.glob('*.seg'))) == 1
    damaged = bytearray(packed[2].read_bytes())
    damaged[len(damaged)//2] ^= 1
    packed[2].write_bytes(damaged)
    with pytest.raises(DataError, match=packed[2].name): list(read_journal(tmp_path))

# Waits in threads and in coroutines for records that will not fit, and prints what each of them was told.
FULL = '''
import asyncio, resource, sys, threading
from hftlab.core.errors import StoreError
from hftlab.core.journal import Journal
if sys.argv[2]: resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
j = Journal(sys.argv[1], segment_bytes=4096)
j.sync(j.append(1, 1, b'fits'))
def said(f, *args):
    try: sys.stdout.write(f'{f(*args)} must fail\\n')
    except StoreError as e: sys.stdout.write(f'{e}\\n')
async def waits(seq):
    try: sys.stdout.write(f'{await j.saved(seq)} must fail\\n')
    except StoreError as e: sys.stdout.write(f'{e}\\n')
async def main(): await asyncio.gather(*(waits(seq) for _ in range(3)))
seq = j.append(2, 1, bytes(4<<20))
threads = [threading.Thread(target=said, args=(j.sync, seq)) for _ in range(3)]
for t in threads: t.start()
asyncio.run(main())
for t in threads: t.join()
said(j.append, 3, 1, b'more')
said(j.close)
'''

def tell(p:subprocess.Popen, said:str)->None:
    try: out,err = p.communicate(timeout=30)
    finally: p.kill()
    lines = out.decode().splitlines()
    assert p.returncode == 0 and len(lines) == 8, err.decode()
    assert all(said in line for line in lines), lines

def test_a_file_that_may_not_grow(tmp_path):
    tell(child(FULL, tmp_path, 1<<20), 'the disk must take every group, was: File too large')
    with Journal(tmp_path) as j: assert j.last == 1

def test_full_disk(tmp_path):
    small = 'mount -t tmpfs -o size=1m none "$0" && exec "$@"'
    mount = ['unshare', '--user', '--map-root-user', '--mount', 'sh', '-c', small, str(tmp_path)]
    if not shutil.which('unshare') or subprocess.run([*mount, 'true'], capture_output=True).returncode:
        pytest.skip('no small disk can be mounted here')
    tell(child(FULL, tmp_path, '', before=mount), 'the disk must take every group, was: No space left on device')
