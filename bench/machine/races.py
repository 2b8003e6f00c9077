"""The last accesses to each place of memory, so that the next access can be compared with them."""

import numpy as np

_NOBODY, _SEVERAL = -1, -2


class Touched:
    """Last writer and last reader of every place, with the epoch of each.

    An agent is a number, such as that of a warp. An epoch is, for example, the number of barriers passed; accesses in different
    epochs are ordered. Two accesses to one place in one epoch by two agents, one of them a write, are a race.

    >>> places = Touched(4)
    >>> at, warps, epochs = np.array([[0], [1]]), np.array([0, 1]), np.array([7, 7])
    >>> bool(places.write(at, warps, epochs).any())  # two warps write two places
    False
    >>> places.read(at[::-1], warps, epochs).tolist()  # each reads what the other has written
    [True, True]
    >>> places.read(at[::-1], warps, epochs + 1).tolist()  # and after a barrier
    [False, False]
    """

    def __init__(self, places: int) -> None:
        self._writer = np.full(places, _NOBODY, np.int32)
        self._write_epoch = np.full(places, -1, np.int64)
        self._reader = np.full(places, _NOBODY, np.int32)
        self._read_epoch = np.full(places, -1, np.int64)

    def read(self, at: np.ndarray, agents: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Note reads of places ``at`` (accesses, places of each); True where another agent's write is not in order."""
        agent, epoch = np.broadcast_to(agents[:, None], at.shape), np.broadcast_to(epochs[:, None], at.shape)
        race = (self._write_epoch[at] == epoch) & (self._writer[at] != agent)
        others = (self._read_epoch[at] == epoch) & (self._reader[at] != agent)
        self._reader[at] = agent
        others |= self._reader[at] != agent  # two agents in one instruction
        self._reader[at[others]] = _SEVERAL
        self._read_epoch[at] = epoch
        return race.any(1)

    def write(self, at: np.ndarray, agents: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Note writes; True where another agent's read is not in order. See `rivals` for its writes."""
        agent, epoch = np.broadcast_to(agents[:, None], at.shape), np.broadcast_to(epochs[:, None], at.shape)
        race = (self._read_epoch[at] == epoch) & (self._reader[at] != agent)
        self._writer[at] = agent
        self._write_epoch[at] = epoch
        return race.any(1)

    def rivals(self, at: np.ndarray, agents: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """True where another agent has written the place in this epoch; ask before `write`."""
        return ((self._write_epoch[at] == epochs[:, None]) & (self._writer[at] != agents[:, None])).any(1)

    def crowded(self, at: np.ndarray, agents: np.ndarray) -> np.ndarray:
        """True where another agent wrote the place in the same instruction; ask after `write`."""
        return (self._writer[at] != agents[:, None]).any(1)
