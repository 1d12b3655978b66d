-- Which recorders load into this database, and how far it holds each one's journal. A recorder writes here
-- before and after each range of rows, so that loading goes on at the right record whatever became of
-- its own files, and so that two copies of one recorder are told apart. The rows are no recorded data:
-- retention leaves them alone.
--
-- A row for each state of an entry; greater numbers are later, so max() over the rows of an entry is its
-- state: SELECT journal_id, shard, epoch, max(loaded_to) FROM recorders GROUP BY ALL.

CREATE TABLE IF NOT EXISTS recorders
(
    journal_id UUID                   CODEC(ZSTD(3)) COMMENT 'journal.json of the recorder',
    shard      UInt32                 CODEC(ZSTD(3)),
    epoch      UInt64                 CODEC(ZSTD(3)) COMMENT 'counts the starts of the recorder',
    token      String                 CODEC(ZSTD(3)) COMMENT 'with the epoch: one start',
    began      UInt64                 CODEC(ZSTD(3)) COMMENT 'the first journal record of that start',
    loaded_to  UInt64                 CODEC(ZSTD(3)) COMMENT 'the rows of every record before this are here',
    planned_to UInt64                 CODEC(ZSTD(3)) COMMENT 'rows up to here may be here too: a write was begun',
    host       String                 CODEC(ZSTD(3)),
    folder     String                 CODEC(ZSTD(3)) COMMENT 'the journal, on that host',
    updated_at DateTime64(3, 'UTC')   CODEC(ZSTD(3)) COMMENT 'by the server''s clock, for people',
    revision   UInt64                 CODEC(ZSTD(3)) COMMENT 'loaded_to + planned_to: which row of an entry stays'
)
ENGINE = ReplacingMergeTree(revision)
ORDER BY (journal_id, shard, epoch, token)
SETTINGS non_replicated_deduplication_window = 10000
COMMENT 'Which recorders load into this database, and how far it holds each one''s journal.';
