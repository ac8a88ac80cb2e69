"""The rows of the tables that the kernels read, all int64.

Letters, everywhere in this package:
    P, Q: the rows in memory of one matrix, and their length
    ld: elements from one row in memory to the next
    u, v: its P and Q scales; r and c, or c and r where a row in memory is a column of the matrix
    BM, BN: rows and columns in memory of a tile
"""

from typing import NamedTuple

# What a side's scales are found from: they are given, or from the bare gradient, or multiply up.
GIVEN, BARE, SCALED = 0, 1, 2


class Matrix(NamedTuple):
    """A gradient to find the scales of. Places count elements."""

    owner: int  # the tensor, by its place in the list of addresses
    offset: int  # from the tensor's first entry to the matrix's
    P: int
    Q: int
    ld: int
    u: int  # where its scales lie among those of all matrices
    v: int
    start: int  # where its first column scales lie in the tensor that gives them
    row_sums: int = 0  # where partial sums of its rows in memory lie, a vector a column of tiles
    col_sums: int = 0  # and those of its columns, a vector a row of tiles
    number: int = 0  # of the matrix, from 0
    unused: int = 0


class Program(NamedTuple):
    """What one program does: a line of tiles."""

    matrix: int  # row of the table of matrices
    line: int  # the tiles' row where columns are summed, their column where rows are
    first: int  # tiles of the line
    beyond: int


class Target(NamedTuple):
    """A parameter's matrix to update. Places count elements."""

    owner: int
    offset: int  # from the parameter's first entry to the matrix's
    grad_offset: int
    P: int
    Q: int
    ld: int
    grad_ld: int
    u: int  # where its scales lie in their tensors
    v: int
    place: int  # of its first entry, counted in reading order over the parameter
    row_place: int  # what one row in memory adds to the place
    col_place: int
    rank: int = 0  # of the matrix that is subtracted, tall @ wide.T
    factor: int = 0  # where that of the scaled gradient lies in its tensor
    tall: int = 0  # where the matrix's P by ``rank`` numbers begin in their tensor
    tall_ld: int = 0  # from one row in memory to the next
    tall_apart: int = 0  # from one column of the numbers to the next
    wide: int = 0
    wide_ld: int = 0
    wide_apart: int = 0


class Addresses(NamedTuple):
    """What a parameter's update reads and writes; 0 where there is nothing."""

    param: int
    grad: int
    u: int
    v: int
    allowed: int
    key: int
    factor: int = 0
    tall: int = 0
    wide: int = 0


class Block(NamedTuple):
    """A gradient's matrix, and the parameter's, to descend on. Places count elements."""

    tensor: int  # the gradient, by its place in the list of addresses
    offset: int  # from the tensor's first entry to the matrix's
    P: int
    Q: int
    ld: int
    u: int  # where its scales lie among those of all matrices
    v: int
    start: int  # where its first column scales lie in the tensor that gives them
    state: int  # where its `State` lies among the numbers of all
    bad: int  # where it is noted that its owner has an entry that is not finite
    param_offset: int
    param_ld: int
    place: int  # of the parameter's first entry, counted in reading order
    row_place: int  # what one row in memory adds to the place
    col_place: int
    parts: int = 0  # where the partial sums of its programs lie, a vector each
    counters: int = 0  # where it is counted how many programs of a group have arrived
    programs: int = 0


class State(NamedTuple):
    """What launches tell each other of a matrix, int32, 0 at first."""

    live_u: int  # scales that are not zero
    live_v: int
    moved: int  # whether a row scale moved in this iteration
    settled: int  # whether none did in one


class Walk(NamedTuple):
    """What one program does: some rows in memory, from the first to the last."""

    block: int  # row of the table of blocks
    number: int  # of the program among those of the matrix
    first: int  # row
    beyond: int
