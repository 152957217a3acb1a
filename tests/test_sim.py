"The simulated exchange outlives whoever trades on it: killed at any moment, nothing it said is lost and nothing is done twice"
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from hftlab.core.events import Balance, Holding, OrderUpdate
from hftlab.venues.sim import Sim

TRADER = '''
import math, sys
from pathlib import Path
from hftlab.core.events import Submit
from hftlab.venues.sim import Sim
file, log = Path(sys.argv[1]), Path(sys.argv[2])

def order(i): return Submit(0, 0, 'BTCUSDT', f'o-{i}', 1 - 2*(i % 2), .01, math.nan, math.nan, 'market', 'gtc', False, 1)

sim = Sim.load(file.read_bytes(), lambda e: None, file) if file.exists() else Sim(lambda e: None, file=file)
sim.skip(sim.now_ns + 10**9)
meant = len(log.read_text().split()) if log.exists() else 0
for i in range(meant): # Whatever was meant is asked for, and sent again where it is not known
    if sim.ask(f'o-{i}') is None: sim.send(order(i))
with log.open('a', buffering=1) as f:
    for i in range(meant, 10**6):
        f.write(f'{i}\\n')
        sim.send(order(i))
        if i % 3 == 0: sim.send(order(i))
        sim.advance(sim.now_ns + (i % 7)*10**6)
'''


def lines(log): return log.read_bytes().count(b'\n') if log.exists() else 0


def wait_for_lines(log, n, seconds=60):
    until = time.monotonic() + seconds
    while lines(log) < n:
        assert time.monotonic() < until, 'the trader must get on in time'
        time.sleep(.002)


def test_killed_ten_times(tmp_path):
    file, log, rng = tmp_path/'sim', tmp_path/'log', random.Random(5)
    for _ in range(10):
        p = subprocess.Popen([sys.executable, '-c', TRADER, file, log], cwd=Path(__file__).parent.parent)
        wait_for_lines(log, lines(log) + rng.randint(1, 60))
        os.kill(p.pid, signal.SIGKILL)
        p.wait()
    sim = Sim.load(file.read_bytes(), lambda e: None)
    sim.skip(sim.now_ns + 10**9)
    known, fills = sim.life.ledger.orders, sim.fills(0)
    assert lines(log) - 1 <= len(known) <= lines(log), 'only the last order may have been meant and not sent'
    assert all(o.status == 'filled' and o.filled == 10 for o in known.values())
    assert round(sum(f.qty for f in fills), 3) == round(.01*len(known), 3)
    money = 10_000 + sum(f.realized_pnl - f.fee for f in fills)
    state = sim.state()
    assert abs(next(e.wallet for e in state if isinstance(e, Balance)) - money) < 1e-6
    assert next(e.qty for e in state if isinstance(e, Holding)) == round(sum(f.side*f.qty for f in fills), 3)
    assert not [e for e in state if isinstance(e, OrderUpdate)]
