-- What a boot has drained is told with the instant from before it looked: whoever reads it late learns nothing wrong.
comment on column replicas.spool_drained_at is 'What other boots of this replica had armed before this instant is not in its spool any more: this boot has looked since, and applied what it found. Null until then.';
