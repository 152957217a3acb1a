"What trades on the simulated exchange is recorded, the same in SQLite and in PostgreSQL"
import math
from hftlab.core.bus import Bus
from hftlab.core.events import Denied, Fill, OrderUpdate, Signal, Submit
from hftlab.core.store import Store
from hftlab.trade.recorder import Recorder, Sent, recorded
from hftlab.venues.sim import Sim

S, nan = 10**9, math.nan


def test_trading_is_recorded(url):
    with Store(url) as store, Bus() as bus:
        recorder, told = Recorder(store).listen(bus), []
        sim = Sim(lambda e: (told.append(e), bus.publish('venue', e)), seed=2)
        sim.advance(sim.now_ns + S)
        for i in range(12):
            side, now = 1 - 2*(i % 2), sim.now_ns
            px = nan if i % 3 else round(sim.life.mid - side, 1)
            o = Submit(now, now, 'BTCUSDT', f'run-{i}', side, .01, px, nan, 'limit' if px == px else 'market', 'gtc', False, 1 + i//6)
            bus.publish('order', Signal(now, now, 'BTCUSDT', 'test', side, .5, 60*S, nan, px, 1 + i//6))
            bus.publish('order', o)
            sim.send(o)
            sim.advance(now + 20*S)
        bus.publish('order', Denied(now, now, 'BTCUSDT', 'test', 1, 'daily_loss', 2, 'why'))
        recorder.close()
        fills, orders = [e for e in told if isinstance(e, Fill)], recorded(store, Sent)
        assert recorded(store, Fill) == fills and len(fills) > 6
        assert [o.client_id for o in orders] == [f'run-{i}' for i in range(12)]
        for o in orders:
            u = [e for e in told if isinstance(e, OrderUpdate) and e.client_id == o.client_id][-1]
            assert (o.status, o.filled_qty, o.venue_id) == (u.status, u.filled_qty, u.venue_id)
        first = {o.client_id for o in recorded(store, Sent, release=1)}
        assert recorded(store, Fill, release=1) == [f for f in fills if f.client_id in first]
        assert len(recorded(store, Signal)) == 12 and math.isnan(recorded(store, Signal)[0].stop_px)
        assert [d.rule for d in recorded(store, Denied, release=2)] == ['daily_loss']
