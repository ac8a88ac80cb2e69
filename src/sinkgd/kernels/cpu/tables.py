"""The tables by which Python tells the loops what to do: int64 fields, at these bytes of a row.

Letters, everywhere in the loops. A matrix is seen as it lies in memory:
    P, Q: its rows in memory and their length; the last stride is 1
    U, V: scales of rows and columns in memory, float32, by their addresses; while they are sought,
        their squares
    TURNED: a row in memory is a column of the matrix, so V comes first
"""

# A gradient G, LD bytes from one row to the next, and beside it a parameter W, or 0 for none.
#     STARTED: the column scales, squared, are given
#     FAILED: written by the loops where they found no scales
#     ALLOWED: the address of a flag that allows the update, or 0
#     KEYED: KEY says how to round at random; PLACE is what the first entry counts as, in the order
#         in which a matrix is read
#     ADDED: a matrix of this rank is added to U∘G∘V, or 0: LEFT, all numbers of a row in memory
#         beside each other, times RIGHT, as many vectors for every sixteen columns
(
    G, P, Q, LD, DTYPE, TURNED, U, V, STARTED, FAILED,
    W, WLD, WDTYPE, ALLOWED, KEYED, KEY, PLACE, ADDED, LEFT, RIGHT,
) = range(0, 160, 8)  # fmt: skip
MATRIX_FIELDS = 20
# A tensor X to look through, without gaps. BAD is written by the loops.
(X, ENTRIES, XDTYPE, BAD) = range(0, 32, 8)
LOOK_FIELDS = 4
# A gradient to add up the squares of: along its rows in memory (ALONG) by weights FROM of columns
# into TO of rows, or down its columns the other way round. SG to SDTYPE as of a matrix.
(SG, SP, SQ, SLD, SDTYPE, ALONG, FROM, TO) = range(0, 64, 8)
SUMS_FIELDS = 8
# An update X = U∘G∘V to multiply with BLOCKS of sixteen vectors. MG to MV as of a matrix.
#     WIDE: the vectors, all numbers of a column in memory beside each other; or 0: TALL is given
#     TALL: X times these, all numbers of a row in memory beside each other
#     DOWN: where Xᵀ times TALL goes, as WIDE lies, or 0
#     SQUARES: where the sum of the squares of every row in memory goes, where WIDE is there
(
    MG, MP, MQ, MLD, MDTYPE, MU, MV, BLOCKS, WIDE, TALL, DOWN, SQUARES,
) = range(0, 96, 8)  # fmt: skip
PRODUCT_FIELDS = 12
# The header of a job. NEXT: the next row of the table to claim. NUMBERS: the address of four
# doubles, the factors of parameter and update, then the least and the largest quotient of squared
# scales that count as no movement (0 where none is looked for). PANELS: scratch of `PANEL` bytes a
# thread, for products. The rest is for scales alone.
(TABLE, COUNT, WORKERS, NEXT, NUMBERS, PANELS, ITERS, SCRATCH, STRIDE, WHOLE) = range(0, 80, 8)
ARRIVED = 256  # how often a thread came to a barrier; on a line of its own
HEADER_FIELDS = 48

# Of a block: as many as a register has numbers.
VECTORS = 16

# Of a panel of an update: two of them and their vectors stay in the first cache, of 32 KiB or more.
ROWS, COLUMNS = 16, 128
PANEL = 4 * ROWS * (COLUMNS + VECTORS)  # bytes: a panel, and sixteen numbers for each of its rows

# What DTYPE can be.
F32 = 0
BF16 = 1
