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
(
    G, P, Q, LD, DTYPE, TURNED, U, V, STARTED, FAILED,
    W, WLD, WDTYPE, ALLOWED, KEYED, KEY, PLACE,
) = range(0, 136, 8)  # fmt: skip
MATRIX_FIELDS = 17
# A tensor X to look through, without gaps. BAD is written by the loops.
(X, ENTRIES, XDTYPE, BAD) = range(0, 32, 8)
LOOK_FIELDS = 4
# A gradient to add up the squares of: along its rows in memory (ALONG) by weights FROM of columns
# into TO of rows, or down its columns the other way round. SG to SDTYPE as of a matrix.
(SG, SP, SQ, SLD, SDTYPE, ALONG, FROM, TO) = range(0, 64, 8)
SUMS_FIELDS = 8
# The header of a job. NEXT: the next row of the table to claim. NUMBERS: the address of four
# doubles, the factors of parameter and update, then the least and the largest quotient of squared
# scales that count as no movement (0 where none is looked for). The rest is for scales alone.
(TABLE, COUNT, WORKERS, NEXT, NUMBERS, ITERS, SCRATCH, STRIDE, WHOLE) = range(0, 72, 8)
ARRIVED = 256  # how often a thread came to a barrier; on a line of its own
HEADER_FIELDS = 48

# What DTYPE can be.
F32 = 0
BF16 = 1
