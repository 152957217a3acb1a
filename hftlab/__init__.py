"""A notebook-driven workbench from research to live trading of Binance USDT-M perpetual futures

Modules:

- `hftlab.app.bench`: What is measured, against whom, and whether it holds
- `hftlab.app.cli`: `hftlab`: a command is a plain function, and its parameter comments are its help
- `hftlab.app.demo`: The shortest true thing that this package does, in a few seconds, with nothing but itself
- `hftlab.core.bus`: Everybody may watch, and nobody who watches can hold up an order
- `hftlab.core.clock`: Wall time and replayed time behind one face, and ids that repeat in a replay
- `hftlab.core.errors`: One tree, and what the runner does about each branch of it
- `hftlab.core.events`: Everything that happens, as small frozen records that read back the same from bytes and from JSON
- `hftlab.core.journal`: Everything that happened and everything that was decided, in order, on the disk, and never in the way of an order
- `hftlab.core.kernel`: One compiled step, driven twice: research loops over it, live calls it, and both get the same bits
- `hftlab.core.secrets`: A key that is printed once is a key that has leaked
- `hftlab.core.segments`: How the journal lies on the disk, and how a file tells what was never safe from what has been damaged
- `hftlab.core.settings`: Every knob of the laboratory, typed, on one page
- `hftlab.core.sources`: settings.ini < release < environment < command line, and every value knows where it came from
- `hftlab.data.synth`: A market made to order: the same seed, the same market, anywhere
- `hftlab.indicators.trend`: Where the price is going, without the noise of how it gets there"""

__version__ = "0.1.0"
