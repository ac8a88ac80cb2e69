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
#     TAKEN: blocks of eight vectors whose products are taken away from the update, or 0: those at
#         LEFT, all numbers of a row in memory beside each other, times those at RIGHT, Q each
(
    G, P, Q, LD, DTYPE, TURNED, U, V, STARTED, FAILED,
    W, WLD, WDTYPE, ALLOWED, KEYED, KEY, PLACE, TAKEN, LEFT, RIGHT,
) = range(0, 160, 8)  # fmt: skip
MATRIX_FIELDS = 20
# A tensor X to look through, without gaps. BAD is written by the loops.
(X, ENTRIES, XDTYPE, BAD) = range(0, 32, 8)
LOOK_FIELDS = 4
# A gradient to add up the squares of: along its rows in memory (ALONG) by weights FROM of columns
# into TO of rows, or down its columns the other way round. SG to SDTYPE as of a matrix.
(SG, SP, SQ, SLD, SDTYPE, ALONG, FROM, TO) = range(0, 64, 8)
SUMS_FIELDS = 8
# An update X = U∘G∘V to multiply with BLOCKS of eight vectors. MG to MV as of a matrix.
#     WIDE: vectors along the rows in memory, Q numbers each; or 0: TALL is given
#     TALL: X times these, all numbers of a row in memory after those of the other
#     DOWN: where Xᵀ times TALL goes, as WIDE lies, or 0
#     SQUARES: where the sum of the squares of every row in memory goes, where WIDE is there
(
    MG, MP, MQ, MLD, MDTYPE, MU, MV, BLOCKS, WIDE, TALL, DOWN, SQUARES,
) = range(0, 96, 8)  # fmt: skip
PRODUCT_FIELDS = 12
# The header of a job. NEXT: the next row of the table to claim. NUMBERS: the address of four
# doubles, the factors of parameter and update, then the least and the largest quotient of squared
# scales that count as no movement (0 where none is looked for). The rest is for scales alone.
(TABLE, COUNT, WORKERS, NEXT, NUMBERS, ITERS, SCRATCH, STRIDE, WHOLE) = range(0, 72, 8)
ARRIVED = 256  # how often a thread came to a barrier; on a line of its own
HEADER_FIELDS = 48

# Of a block: with two rows these are 16 sums, half of the registers that there are.
VECTORS = 8

# What DTYPE can be.
F32 = 0
BF16 = 1
