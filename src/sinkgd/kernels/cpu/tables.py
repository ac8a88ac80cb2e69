"""The tables by which Python tells the loops what to do: int64 fields, at these bytes of an entry.

Letters, everywhere in the loops. A matrix is seen as it lies in memory:
    P, Q: its rows in memory and their length; the last stride is 1
    LD: bytes from one row to the next
    U, V: squared scales of rows and columns in memory, float32, by their addresses
    TURNED: a row in memory is a column of the matrix, so V comes first
"""

# A gradient to find the scales of. STARTED: the column scales, squared, are given; FAILED is
# written by the loops.
(G, P, Q, LD, DTYPE, TURNED, U, V, STARTED, FAILED) = range(0, 80, 8)
GRADIENT_FIELDS = 10
# A parameter W to update from its gradient WG. ALLOWED: the address of a flag, or 0. KEYED: KEY
# says how to round; PLACE is what the first entry of the matrix counts as, in reading order.
(W, WG, WP, WQ, WLD, GLD, WDTYPE, GDTYPE, WTURNED, WU, WV, ALLOWED, KEYED, KEY, PLACE) = range(
    0, 120, 8
)
UPDATE_FIELDS = 15
# A tensor X to look through, without gaps. BAD is written by the loops.
(X, ENTRIES, XDTYPE, BAD) = range(0, 32, 8)
LOOK_FIELDS = 4
# The header of a job. NEXT: the next entry to claim. NUMBERS: the address of doubles, for scales
# the least and the largest quotient of squared scales that count as no movement (0 where none is
# looked for), for updates the factors of parameter and update.
(TABLE, COUNT, WORKERS, NEXT, NUMBERS, ITERS, SCRATCH, STRIDE, WHOLE) = range(0, 72, 8)
ARRIVED = 256  # how often a thread came to a barrier; on a line of its own
HEADER_FIELDS = 48

# What DTYPE can be.
F32 = 0
BF16 = 1
