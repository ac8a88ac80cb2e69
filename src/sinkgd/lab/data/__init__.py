"""Data: documents become tokens, shards of tokens, and then the batches of training steps."""

from sinkgd.lab.data.batches import IGNORE_INDEX as IGNORE_INDEX
from sinkgd.lab.data.batches import Batch as Batch
from sinkgd.lab.data.batches import Batches as Batches
from sinkgd.lab.data.batches import Packing as Packing
from sinkgd.lab.data.batches import VocabularyShift as VocabularyShift
from sinkgd.lab.data.batches import evaluation_batches as evaluation_batches
from sinkgd.lab.data.corpus import C4Corpus as C4Corpus
from sinkgd.lab.data.corpus import Corpus as Corpus
from sinkgd.lab.data.corpus import Document as Document
from sinkgd.lab.data.corpus import FileCorpus as FileCorpus
from sinkgd.lab.data.corpus import open_corpus as open_corpus
from sinkgd.lab.data.dataset import Manifest as Manifest
from sinkgd.lab.data.dataset import SplitEntry as SplitEntry
from sinkgd.lab.data.dataset import TokenDataset as TokenDataset
from sinkgd.lab.data.dataset import TokenSplit as TokenSplit
from sinkgd.lab.data.documents import DataError as DataError
from sinkgd.lab.data.prepare import Progress as Progress
from sinkgd.lab.data.prepare import prepare as prepare
from sinkgd.lab.data.prepare import prepared_corpus as prepared_corpus
from sinkgd.lab.data.prepare import shards_at as shards_at
from sinkgd.lab.data.prepare import train_tokenizer as train_tokenizer
from sinkgd.lab.data.shards import FolderTakenError as FolderTakenError
from sinkgd.lab.data.shards import ShardWriter as ShardWriter
from sinkgd.lab.data.tokenizer import Tokenizer as Tokenizer
from sinkgd.lab.data.tokenizer import load_tokenizer as load_tokenizer
