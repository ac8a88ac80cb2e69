"""One of every built-in norm, over which the tests of norms loop."""

import sinkgd

NORMS = {
    "spectral": sinkgd.SpectralNorm(),
    "deflated": sinkgd.DeflatedNorm(2),
    "frobenius": sinkgd.FrobeniusNorm(),
    "row": sinkgd.RowNorm(),
    "column": sinkgd.ColumnNorm(),
    "sign": sinkgd.SignNorm(),
}
