\echo Use "CREATE EXTENSION dbmodule" to load this file. \quit

-- The catalog of backups and the queue of jobs. Tables live in schema dbmodule; the functions that
-- people call live in the schema that CREATE EXTENSION chose. A function only enqueues: the agent,
-- which reads the data directory, does the work and writes the results back.
--
-- Nothing here is marked for pg_dump: backups are a projection of the repository, jobs and lineage
-- marks are true only of the cluster that they were written in.
--
-- Function bodies are parsed with the caller's settings, so none of them depends on
-- standard_conforming_strings, and none of them looks a name up in the caller's search_path.

-- Roles ----------------------------------------------------------------------------------------

DO $roles$
DECLARE
    wanted record;
BEGIN
    FOR wanted IN
        SELECT * FROM (VALUES
            ('dbmodule_reader', 'dbmodule: sees backups, chains, jobs and events'),
            ('dbmodule_operator', 'dbmodule: runs and awaits backups; includes dbmodule_reader'),
            ('dbmodule_admin', 'dbmodule: changes policies; includes dbmodule_operator'),
            ('dbmodule_agent', 'dbmodule: what the agent and the commands need to keep the catalog')
        ) AS r (name, description)
    LOOP
        IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = wanted.name) THEN
            EXECUTE pg_catalog.format('CREATE ROLE %I NOLOGIN', wanted.name);
            EXECUTE pg_catalog.format('COMMENT ON ROLE %I IS %L', wanted.name, wanted.description);
        END IF;
    END LOOP;
    FOR wanted IN
        SELECT * FROM (VALUES
            ('dbmodule_reader', 'dbmodule_operator'),
            ('dbmodule_operator', 'dbmodule_admin'),
            ('dbmodule_reader', 'dbmodule_agent')
        ) AS r (granted, grantee)
    LOOP
        IF NOT pg_catalog.pg_has_role(wanted.grantee, wanted.granted, 'USAGE') THEN
            EXECUTE pg_catalog.format('GRANT %I TO %I', wanted.granted, wanted.grantee);
        END IF;
    END LOOP;
END
$roles$;

-- Tables ---------------------------------------------------------------------------------------

CREATE SCHEMA dbmodule;
COMMENT ON SCHEMA dbmodule IS 'Backups of this cluster: catalog, job queue, lineage marks';

CREATE TABLE dbmodule.backup (
    backup_id text PRIMARY KEY
        CHECK (backup_id ~ '^[0-9]{8}-[0-9]{6}-(full|diff|incr)-[0-9a-f]{6}$'),
    type text NOT NULL CHECK (type IN ('full', 'diff', 'incr')),
    baseline_id text CHECK (baseline_id <> backup_id),
    status text NOT NULL CHECK (status IN ('completed', 'completed_with_corruption')),
    label text NOT NULL,
    cluster text NOT NULL,
    system_identifier numeric(20, 0) NOT NULL CHECK (system_identifier >= 0),
    timeline bigint NOT NULL CHECK (timeline BETWEEN 1 AND 4294967295),
    start_lsn pg_lsn NOT NULL,
    stop_lsn pg_lsn NOT NULL,
    started_at timestamptz NOT NULL,
    finished_at timestamptz NOT NULL,
    detector text NOT NULL,
    files_total bigint NOT NULL CHECK (files_total >= 0),
    pages_total bigint NOT NULL CHECK (pages_total >= 0),
    pages_changed bigint NOT NULL CHECK (pages_changed >= 0),
    bytes_read bigint NOT NULL CHECK (bytes_read >= 0),
    bytes_changed bigint NOT NULL CHECK (bytes_changed >= 0),
    bytes_stored bigint NOT NULL CHECK (bytes_stored >= 0),
    wal_bytes bigint NOT NULL CHECK (wal_bytes >= 0),
    corrupt_pages bigint NOT NULL CHECK (corrupt_pages >= 0),
    manifest_hash text NOT NULL CHECK (manifest_hash ~ '^[0-9a-f]{64}$'),
    CONSTRAINT backup_full_has_no_baseline CHECK ((type = 'full') = (baseline_id IS NULL)),
    CONSTRAINT backup_lsn_order CHECK (start_lsn <= stop_lsn)
);
COMMENT ON TABLE dbmodule.backup IS
    'Committed backups, a projection of the manifests in the repository';
COMMENT ON COLUMN dbmodule.backup.backup_id IS 'Start time in UTC, type and a random tail';
COMMENT ON COLUMN dbmodule.backup.type IS 'full, diff (since a full) or incr (since any backup)';
COMMENT ON COLUMN dbmodule.backup.baseline_id IS 'Backup that this one builds on; null for a full';
COMMENT ON COLUMN dbmodule.backup.status IS
    'completed, or completed_with_corruption when corrupt pages were found in the source';
COMMENT ON COLUMN dbmodule.backup.label IS 'Free text given when the backup was asked for';
COMMENT ON COLUMN dbmodule.backup.cluster IS 'Name of the cluster in the repository';
COMMENT ON COLUMN dbmodule.backup.system_identifier IS 'Database system identifier of pg_control';
COMMENT ON COLUMN dbmodule.backup.timeline IS 'Timeline on which the backup was taken';
COMMENT ON COLUMN dbmodule.backup.start_lsn IS 'Where recovery of this backup starts to replay';
COMMENT ON COLUMN dbmodule.backup.stop_lsn IS 'Where recovery of this backup becomes consistent';
COMMENT ON COLUMN dbmodule.backup.started_at IS 'When the backup began';
COMMENT ON COLUMN dbmodule.backup.finished_at IS 'When its manifest was committed';
COMMENT ON COLUMN dbmodule.backup.detector IS 'How changed pages were found';
COMMENT ON COLUMN dbmodule.backup.files_total IS 'Files in the backup';
COMMENT ON COLUMN dbmodule.backup.pages_total IS 'Pages in the backup';
COMMENT ON COLUMN dbmodule.backup.pages_changed IS 'Pages that differ from the baseline';
COMMENT ON COLUMN dbmodule.backup.bytes_read IS 'Bytes read from the data directory';
COMMENT ON COLUMN dbmodule.backup.bytes_changed IS 'Bytes that differ from the baseline';
COMMENT ON COLUMN dbmodule.backup.bytes_stored IS 'Bytes added to the repository';
COMMENT ON COLUMN dbmodule.backup.wal_bytes IS 'Bytes of WAL kept with the backup';
COMMENT ON COLUMN dbmodule.backup.corrupt_pages IS 'Pages that fail their own checksum';
COMMENT ON COLUMN dbmodule.backup.manifest_hash IS 'BLAKE3 of the manifest, in hexadecimal';

CREATE TABLE dbmodule.backup_dependency (
    backup_id text PRIMARY KEY
        REFERENCES dbmodule.backup (backup_id) ON DELETE CASCADE,
    baseline_id text NOT NULL
        REFERENCES dbmodule.backup (backup_id) ON DELETE RESTRICT,
    CHECK (baseline_id <> backup_id)
);
CREATE INDEX backup_dependency_baseline_id_idx ON dbmodule.backup_dependency (baseline_id);
COMMENT ON TABLE dbmodule.backup_dependency IS
    'Which backup needs which: a backup that another depends on cannot be deleted';
COMMENT ON COLUMN dbmodule.backup_dependency.backup_id IS 'The backup that depends';
COMMENT ON COLUMN dbmodule.backup_dependency.baseline_id IS 'The backup that it depends on';
COMMENT ON INDEX dbmodule.backup_dependency_baseline_id_idx IS 'Finds what depends on a backup';

CREATE TABLE dbmodule.backup_relation (
    backup_id text NOT NULL
        REFERENCES dbmodule.backup (backup_id) ON DELETE CASCADE,
    tablespace oid NOT NULL,
    database oid NOT NULL,
    relfilenode oid NOT NULL,
    fork text NOT NULL CHECK (fork IN ('main', 'fsm', 'vm', 'init')),
    pages_changed bigint NOT NULL CHECK (pages_changed > 0),
    database_name text,
    relation_name text,
    table_name text,
    PRIMARY KEY (backup_id, tablespace, database, relfilenode, fork)
);
COMMENT ON TABLE dbmodule.backup_relation IS
    'What changed: pages of each fork of a relation that a backup found to differ from its baseline';
COMMENT ON COLUMN dbmodule.backup_relation.backup_id IS 'The backup that stored the pages';
COMMENT ON COLUMN dbmodule.backup_relation.tablespace IS 'OID of the tablespace';
COMMENT ON COLUMN dbmodule.backup_relation.database IS
    'OID of the database; 0 for relations that all databases share';
COMMENT ON COLUMN dbmodule.backup_relation.relfilenode IS 'Number that the file is called by';
COMMENT ON COLUMN dbmodule.backup_relation.fork IS 'main, fsm, vm or init';
COMMENT ON COLUMN dbmodule.backup_relation.pages_changed IS
    'Pages of 8 kB that differ from the baseline; all pages of a full';
COMMENT ON COLUMN dbmodule.backup_relation.database_name IS
    'Name of the database at the time of the backup; null when shared or unknown';
COMMENT ON COLUMN dbmodule.backup_relation.relation_name IS
    'Name, with its schema, at the time of the backup; null when unknown';
COMMENT ON COLUMN dbmodule.backup_relation.table_name IS
    'Table that an index or a TOAST relation belongs to; of any other relation its own name';

CREATE TABLE dbmodule.corrupt_page (
    backup_id text NOT NULL
        REFERENCES dbmodule.backup (backup_id) ON DELETE CASCADE,
    path text NOT NULL,
    tablespace oid,
    database oid,
    relfilenode oid,
    fork text,
    block bigint NOT NULL CHECK (block >= 0),
    lsn pg_lsn NOT NULL,
    expected integer NOT NULL,
    actual integer NOT NULL,
    database_name text,
    relation_name text,
    table_name text,
    last_good_backup_id text,
    PRIMARY KEY (backup_id, path, block)
);
COMMENT ON TABLE dbmodule.corrupt_page IS
    'Pages of the source that failed their checksum, however often a backup read them';
COMMENT ON COLUMN dbmodule.corrupt_page.backup_id IS 'The backup that found and stored the page';
COMMENT ON COLUMN dbmodule.corrupt_page.path IS 'File, relative to the data directory';
COMMENT ON COLUMN dbmodule.corrupt_page.tablespace IS 'OID of the tablespace';
COMMENT ON COLUMN dbmodule.corrupt_page.database IS
    'OID of the database; 0 for relations that all databases share';
COMMENT ON COLUMN dbmodule.corrupt_page.relfilenode IS 'Number that the file is called by';
COMMENT ON COLUMN dbmodule.corrupt_page.fork IS 'Fork of the relation';
COMMENT ON COLUMN dbmodule.corrupt_page.block IS 'Number of the page within the fork';
COMMENT ON COLUMN dbmodule.corrupt_page.lsn IS 'LSN in the header of the page';
COMMENT ON COLUMN dbmodule.corrupt_page.expected IS 'Checksum that the bytes of the page give';
COMMENT ON COLUMN dbmodule.corrupt_page.actual IS 'Checksum that the page carries';
COMMENT ON COLUMN dbmodule.corrupt_page.database_name IS
    'Name of the database at the time of the backup; null when shared or unknown';
COMMENT ON COLUMN dbmodule.corrupt_page.relation_name IS
    'Name, with its schema, at the time of the backup; null when unknown';
COMMENT ON COLUMN dbmodule.corrupt_page.table_name IS
    'Table that an index or a TOAST relation belongs to; of any other relation its own name';
COMMENT ON COLUMN dbmodule.corrupt_page.last_good_backup_id IS
    'Newest earlier backup, when this one was taken, with a copy that passes its checksum';

CREATE TABLE dbmodule.job (
    job_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    type text NOT NULL CHECK (type IN ('full', 'diff', 'incr')),
    baseline_id text,
    label text NOT NULL DEFAULT '',
    detect text NOT NULL DEFAULT 'auto' CHECK (detect IN ('auto', 'wal', 'scan', 'content')),
    state text NOT NULL DEFAULT 'queued'
        CHECK (state IN ('queued', 'running', 'completed', 'failed', 'cancelled')),
    requested_by name NOT NULL DEFAULT SESSION_USER,
    requested_at timestamptz NOT NULL DEFAULT now(),
    requesting xid8 NOT NULL DEFAULT pg_current_xact_id(),
    claimed_by text,
    claimed_at timestamptz,
    heartbeat_at timestamptz,
    phase text NOT NULL DEFAULT '',
    bytes_done bigint NOT NULL DEFAULT 0 CHECK (bytes_done >= 0),
    bytes_total bigint NOT NULL DEFAULT 0 CHECK (bytes_total >= 0),
    attempts integer NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    finished_at timestamptz,
    backup_id text,
    error jsonb,
    report jsonb,
    CONSTRAINT job_running_is_claimed CHECK
        ((state = 'running') <= (claimed_by IS NOT NULL AND claimed_at IS NOT NULL)),
    CONSTRAINT job_ended_has_time CHECK
        ((state IN ('completed', 'failed', 'cancelled')) = (finished_at IS NOT NULL)),
    CONSTRAINT job_completed_has_backup CHECK ((state = 'completed') = (backup_id IS NOT NULL)),
    CONSTRAINT job_failed_has_error CHECK ((state = 'failed') <= (error IS NOT NULL))
);
-- State is the predicate and not a key: a heartbeat then stays a heap-only update.
CREATE INDEX job_open_idx ON dbmodule.job (job_id) WHERE state IN ('queued', 'running');
COMMENT ON TABLE dbmodule.job IS
    'The queue: the truth about what was asked for, of which NOTIFY dbmodule_job is only a hint';
COMMENT ON COLUMN dbmodule.job.job_id IS 'What backup_full() and its like return';
COMMENT ON COLUMN dbmodule.job.type IS 'full, diff or incr';
COMMENT ON COLUMN dbmodule.job.baseline_id IS 'Backup to build on, when the caller pinned one';
COMMENT ON COLUMN dbmodule.job.label IS 'Free text that the backup will carry';
COMMENT ON COLUMN dbmodule.job.detect IS
    'How changed pages are to be found: auto, wal, scan or content';
COMMENT ON COLUMN dbmodule.job.state IS 'queued, running, completed, failed or cancelled';
COMMENT ON COLUMN dbmodule.job.requested_by IS 'Login that asked for the job';
COMMENT ON COLUMN dbmodule.job.requested_at IS 'When it was asked for';
COMMENT ON COLUMN dbmodule.job.requesting IS
    'Transaction that asked: waiting for a job inside it would wait for ever';
COMMENT ON COLUMN dbmodule.job.claimed_by IS 'Agent that works or worked on it';
COMMENT ON COLUMN dbmodule.job.claimed_at IS 'When the agent took it';
COMMENT ON COLUMN dbmodule.job.heartbeat_at IS 'Last sign of life of the agent at work';
COMMENT ON COLUMN dbmodule.job.phase IS 'What the agent is doing';
COMMENT ON COLUMN dbmodule.job.bytes_done IS 'Bytes of the phase that are done';
COMMENT ON COLUMN dbmodule.job.bytes_total IS 'Bytes of the phase; 0 where that is not known';
COMMENT ON COLUMN dbmodule.job.attempts IS 'How often the job was claimed';
COMMENT ON COLUMN dbmodule.job.finished_at IS 'When it completed, failed or was cancelled';
COMMENT ON COLUMN dbmodule.job.backup_id IS 'The backup that came of it';
COMMENT ON COLUMN dbmodule.job.error IS 'code, message and hint of a failed job';
COMMENT ON COLUMN dbmodule.job.report IS 'Report of a completed job, as the command prints it';
COMMENT ON INDEX dbmodule.job_open_idx IS 'Finds the oldest open job, however long the history';

CREATE TABLE dbmodule.lineage (
    mark text PRIMARY KEY CHECK (mark ~ '^[0-9a-f]{32}$'),
    backup_id text NOT NULL,
    position text NOT NULL CHECK (position IN ('start', 'stop')),
    xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
    created_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE dbmodule.lineage IS
    'Random marks that backups leave: seeing them proves that a backup is in this cluster''s past';
COMMENT ON COLUMN dbmodule.lineage.mark IS '128 random bits in hexadecimal';
COMMENT ON COLUMN dbmodule.lineage.backup_id IS 'Backup that left the mark, committed or not';
COMMENT ON COLUMN dbmodule.lineage.position IS 'start: before the backup; stop: after it';
COMMENT ON COLUMN dbmodule.lineage.xid IS
    'Transaction that wrote the row; must agree with the system column xmin to count';
COMMENT ON COLUMN dbmodule.lineage.created_at IS 'When the mark was left';

CREATE TABLE dbmodule.event (
    event_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    kind text NOT NULL,
    job_id bigint,
    backup_id text,
    message text NOT NULL DEFAULT ''
);
COMMENT ON TABLE dbmodule.event IS 'What happened, oldest first; the last 10,000 events are kept';
COMMENT ON COLUMN dbmodule.event.event_id IS 'Ascending; not without gaps';
COMMENT ON COLUMN dbmodule.event.at IS 'When it happened';
COMMENT ON COLUMN dbmodule.event.kind IS 'job_ and the state that a job went to';
COMMENT ON COLUMN dbmodule.event.job_id IS 'Job that it is about';
COMMENT ON COLUMN dbmodule.event.backup_id IS 'Backup that it is about';
COMMENT ON COLUMN dbmodule.event.message IS 'Details for a person to read';

CREATE VIEW dbmodule.chain AS
    WITH RECURSIVE member (backup_id, member_id, steps) AS (
        SELECT b.backup_id, b.backup_id, 0 FROM dbmodule.backup AS b
        UNION ALL
        SELECT m.backup_id, d.baseline_id, m.steps + 1
        FROM member AS m JOIN dbmodule.backup_dependency AS d ON d.backup_id = m.member_id
    ) CYCLE member_id SET is_cycle USING path
    SELECT
        m.backup_id,
        (pg_catalog.max(m.steps) OVER (PARTITION BY m.backup_id) - m.steps)::integer AS depth,
        m.member_id,
        b.type,
        b.baseline_id,
        b.start_lsn,
        b.stop_lsn,
        b.started_at,
        b.bytes_stored
    FROM member AS m JOIN dbmodule.backup AS b ON b.backup_id = m.member_id
    WHERE NOT m.is_cycle;
COMMENT ON VIEW dbmodule.chain IS
    'For each backup what a restore of it needs, from its full (depth 0) down to itself';
COMMENT ON COLUMN dbmodule.chain.backup_id IS 'The backup whose chain it is';
COMMENT ON COLUMN dbmodule.chain.depth IS '0 for the full at its root';
COMMENT ON COLUMN dbmodule.chain.member_id IS 'A backup of the chain';
COMMENT ON COLUMN dbmodule.chain.type IS 'Type of the member';
COMMENT ON COLUMN dbmodule.chain.baseline_id IS 'Baseline of the member';
COMMENT ON COLUMN dbmodule.chain.start_lsn IS 'Start LSN of the member';
COMMENT ON COLUMN dbmodule.chain.stop_lsn IS 'Stop LSN of the member';
COMMENT ON COLUMN dbmodule.chain.started_at IS 'When the member began';
COMMENT ON COLUMN dbmodule.chain.bytes_stored IS 'Bytes that the member added to the repository';

-- Inside --------------------------------------------------------------------------------------

CREATE FUNCTION dbmodule.version() RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN '0.1.0';
COMMENT ON FUNCTION dbmodule.version() IS
    'Version of this catalog, however it was installed';

CREATE FUNCTION dbmodule.agent_is_running() RETURNS boolean
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp
    BEGIN ATOMIC
        -- The session advisory lock that an agent holds; the numbers spell "dbmo", 1.
        SELECT EXISTS (
            SELECT FROM pg_catalog.pg_locks AS l
            WHERE l.locktype = 'advisory' AND l.granted
                AND l.database = (SELECT d.oid FROM pg_catalog.pg_database AS d
                                  WHERE d.datname = pg_catalog.current_database())
                AND l.classid = 1684172143 AND l.objid = 1 AND l.objsubid = 2
        );
    END;
COMMENT ON FUNCTION dbmodule.agent_is_running() IS 'Is an agent connected to this database?';

CREATE FUNCTION dbmodule.log_job() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    AS $function$
DECLARE
    newest bigint;
BEGIN
    INSERT INTO dbmodule.event (kind, job_id, backup_id, message)
    VALUES (
        'job_' || NEW.state, NEW.job_id, NEW.backup_id,
        CASE NEW.state
            WHEN 'queued' THEN
                CASE
                    WHEN NEW.attempts > 0 THEN 'queued again'
                    ELSE 'asked for by ' || NEW.requested_by
                END
            WHEN 'running' THEN 'claimed by ' || NEW.claimed_by
            WHEN 'failed' THEN coalesce(NEW.error ->> 'message', '')
            ELSE ''
        END
    )
    RETURNING event_id INTO newest;
    DELETE FROM dbmodule.event WHERE event_id <= newest - 10000;
    RETURN NULL;
END
$function$;
COMMENT ON FUNCTION dbmodule.log_job() IS 'Writes each change of a job''s state to dbmodule.event';

CREATE TRIGGER log_job AFTER INSERT OR UPDATE OF state ON dbmodule.job
    FOR EACH ROW EXECUTE FUNCTION dbmodule.log_job();
COMMENT ON TRIGGER log_job ON dbmodule.job IS 'Keeps dbmodule.event';

CREATE FUNCTION dbmodule.enqueue(kind text, baseline text, label text, detect text) RETURNS bigint
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
    AS $function$
#variable_conflict use_variable
DECLARE
    job bigint;
BEGIN
    label := coalesce(label, '');
    IF length(label) > 200 THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('label has %s characters, 200 are allowed', length(label)),
            HINT = 'Give a shorter label.';
    END IF;
    IF label ~ E'[\\u0001-\\u001F\\u007F]'
        OR (getdatabaseencoding() = 'UTF8' AND label ~ E'[\\u0080-\\u009F\\u2028\\u2029]')
    THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'label contains control characters',
            HINT = 'Write the label as one line of plain text.';
    END IF;
    IF detect IS NULL OR detect NOT IN ('auto', 'wal', 'scan', 'content') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('unknown detector %s', quote_nullable(left(detect, 80))),
            HINT = 'Use auto, wal, scan or content.';
    END IF;
    IF baseline IS NOT NULL THEN
        IF baseline !~ '^[0-9]{8}-[0-9]{6}-(full|diff|incr)-[0-9a-f]{6}$' THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                MESSAGE = format('not a backup id: %s', quote_literal(left(baseline, 80))),
                HINT = 'SELECT backup_id FROM dbmodule.backup shows the ids that exist.';
        END IF;
        IF NOT EXISTS (SELECT FROM dbmodule.backup AS b WHERE b.backup_id = baseline) THEN
            RAISE EXCEPTION USING ERRCODE = 'undefined_object',
                MESSAGE = format('there is no backup %s', baseline),
                HINT = 'SELECT backup_id FROM dbmodule.backup shows the ids that exist.';
        END IF;
    END IF;
    INSERT INTO dbmodule.job AS j (type, baseline_id, label, detect)
    VALUES (kind, baseline, label, detect)
    RETURNING j.job_id INTO job;
    PERFORM pg_notify('dbmodule_job', job::text);
    RETURN job;
END
$function$;
COMMENT ON FUNCTION dbmodule.enqueue(text, text, text, text) IS
    'Checks the arguments of a backup, queues it and tells the agent at commit';

CREATE FUNCTION dbmodule.commit_refusal() RETURNS text
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
    AS $function$
BEGIN
    COMMIT;
EXCEPTION WHEN invalid_transaction_termination THEN
    RETURN SQLERRM;
END
$function$;
COMMENT ON FUNCTION dbmodule.commit_refusal() IS
    'What COMMIT says, in the session''s language, where a transaction cannot be ended: a function '
    'never can. backup_wait() compares it with what it is told itself';

CREATE FUNCTION dbmodule.require_waitable(job bigint) RETURNS void
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
    AS $function$
DECLARE
    requesting xid8;
BEGIN
    SELECT j.requesting INTO requesting FROM dbmodule.job AS j WHERE j.job_id = job;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'undefined_object',
            MESSAGE = format('there is no job %s', coalesce(job::text, 'NULL')),
            HINT = 'A job can be seen once the transaction that asked for it has committed.';
    END IF;
    IF requesting = pg_current_xact_id_if_assigned() THEN
        RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('job %s was asked for in this same transaction', job),
            HINT = 'The agent sees a job only after COMMIT: commit first, then call backup_wait.';
    END IF;
END
$function$;
COMMENT ON FUNCTION dbmodule.require_waitable(bigint) IS
    'Refuses a job that does not exist, or that waiting would keep from ever starting';

CREATE FUNCTION dbmodule.job_has_ended(job bigint) RETURNS boolean
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
    AS $function$
DECLARE
    found_job record;
BEGIN
    SELECT j.state, j.error INTO found_job FROM dbmodule.job AS j WHERE j.job_id = job;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'undefined_object',
            MESSAGE = format('job %s has been deleted', job),
            HINT = 'SELECT * FROM dbmodule.event shows what is still known about it.';
    END IF;
    IF found_job.state = 'failed' THEN
        RAISE EXCEPTION USING ERRCODE = 'external_routine_exception',
            MESSAGE = format('job %s failed: %s', job, found_job.error ->> 'message'),
            DETAIL = coalesce(found_job.error ->> 'code', ''),
            HINT = coalesce(found_job.error ->> 'hint', '');
    ELSIF found_job.state = 'cancelled' THEN
        RAISE EXCEPTION USING ERRCODE = 'external_routine_exception',
            MESSAGE = format('job %s was cancelled', job),
            HINT = 'Ask for the backup again.';
    END IF;
    RETURN found_job.state = 'completed';
END
$function$;
COMMENT ON FUNCTION dbmodule.job_has_ended(bigint) IS
    'True once the job completed; raises its error when it failed or was cancelled';

CREATE FUNCTION dbmodule.chain_of(backup text)
    RETURNS TABLE (
        ordinal integer, member_id text, type text, baseline_id text, start_lsn pg_lsn,
        stop_lsn pg_lsn, started_at timestamptz, bytes_stored bigint)
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
    AS $function$
#variable_conflict use_column
BEGIN
    IF NOT EXISTS (SELECT FROM dbmodule.backup AS b WHERE b.backup_id = backup) THEN
        RAISE EXCEPTION USING ERRCODE = 'undefined_object',
            MESSAGE = format('there is no backup %s', quote_nullable(left(backup, 80))),
            HINT = 'SELECT backup_id FROM dbmodule.backup shows the ids that exist.';
    END IF;
    -- Not from the view: a condition does not reach into its recursion.
    RETURN QUERY
        WITH RECURSIVE member (id, steps) AS (
            SELECT backup, 0
            UNION ALL
            SELECT d.baseline_id, m.steps + 1
            FROM member AS m JOIN dbmodule.backup_dependency AS d ON d.backup_id = m.id
        ) CYCLE id SET is_cycle USING path
        SELECT
            (row_number() OVER (ORDER BY m.steps DESC))::integer,
            b.backup_id, b.type, b.baseline_id, b.start_lsn, b.stop_lsn, b.started_at,
            b.bytes_stored
        FROM member AS m JOIN dbmodule.backup AS b ON b.backup_id = m.id
        WHERE NOT m.is_cycle
        ORDER BY m.steps DESC;
END
$function$;
COMMENT ON FUNCTION dbmodule.chain_of(text) IS 'What backup_chain() returns';

-- What people call -----------------------------------------------------------------------------

CREATE FUNCTION @extschema@.backup_full(label text DEFAULT '', detect text DEFAULT 'auto')
    RETURNS bigint
    LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    RETURN dbmodule.enqueue('full', NULL, label, detect);
COMMENT ON FUNCTION @extschema@.backup_full(text, text) IS
    'Queue a full backup; returns the job id; the agent starts after COMMIT';

CREATE FUNCTION @extschema@.backup_differential(
    label text DEFAULT '', baseline text DEFAULT NULL, detect text DEFAULT 'auto')
    RETURNS bigint
    LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    RETURN dbmodule.enqueue('diff', baseline, label, detect);
COMMENT ON FUNCTION @extschema@.backup_differential(text, text, text) IS
    'Queue a backup of what changed since the latest full, or since baseline; returns the job id';

CREATE FUNCTION @extschema@.backup_incremental(
    label text DEFAULT '', baseline text DEFAULT NULL, detect text DEFAULT 'auto')
    RETURNS bigint
    LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    RETURN dbmodule.enqueue('incr', baseline, label, detect);
COMMENT ON FUNCTION @extschema@.backup_incremental(text, text, text) IS
    'Queue a backup of what changed since the latest one, or since baseline; returns the job id';

CREATE FUNCTION @extschema@.backup_status(
    job bigint,
    OUT job_id bigint, OUT state text, OUT type text, OUT phase text, OUT percent numeric,
    OUT bytes_done bigint, OUT bytes_total bigint, OUT backup_id text, OUT error_message text,
    OUT hint text, OUT requested_at timestamptz, OUT claimed_at timestamptz,
    OUT finished_at timestamptz)
    LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
    AS $function$
#variable_conflict use_column
BEGIN
    SELECT
        j.job_id, j.state, j.type, j.phase,
        CASE
            WHEN j.state = 'completed' THEN 100.0
            WHEN j.bytes_total > 0 THEN least(round(100.0 * j.bytes_done / j.bytes_total, 1), 100.0)
        END,
        j.bytes_done, j.bytes_total, j.backup_id, j.error ->> 'message',
        CASE
            WHEN j.state = 'failed' THEN j.error ->> 'hint'
            WHEN j.state IN ('queued', 'running') AND NOT dbmodule.agent_is_running() THEN
                'No agent is connected: start `dbmodule agent` on the server''s host.'
        END,
        j.requested_at, j.claimed_at, j.finished_at
    INTO
        backup_status.job_id, backup_status.state, backup_status.type, backup_status.phase,
        backup_status.percent, backup_status.bytes_done, backup_status.bytes_total,
        backup_status.backup_id, backup_status.error_message, backup_status.hint,
        backup_status.requested_at, backup_status.claimed_at, backup_status.finished_at
    FROM dbmodule.job AS j WHERE j.job_id = backup_status.job;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'undefined_object',
            MESSAGE = format('there is no job %s', coalesce(job::text, 'NULL')),
            HINT = 'SELECT job_id, state FROM dbmodule.job shows the jobs that exist.';
    END IF;
END
$function$;
COMMENT ON FUNCTION @extschema@.backup_status(bigint) IS
    'How far a job is, what came of it, and what to do if it does not move';

CREATE FUNCTION @extschema@.backup_chain(backup_id text)
    RETURNS TABLE (
        ordinal integer, backup_id text, type text, baseline_id text, start_lsn pg_lsn,
        stop_lsn pg_lsn, started_at timestamptz, bytes_stored bigint)
    LANGUAGE sql STABLE
    BEGIN ATOMIC
        SELECT c.ordinal, c.member_id, c.type, c.baseline_id, c.start_lsn, c.stop_lsn,
            c.started_at, c.bytes_stored
        FROM dbmodule.chain_of($1) AS c
        ORDER BY c.ordinal;
    END;
COMMENT ON FUNCTION @extschema@.backup_chain(text) IS
    'The backups that a restore of this one needs, from the full (ordinal 1) down to itself';

-- A procedure that commits may neither be SECURITY DEFINER nor carry a SET clause, so it runs with
-- the caller's search_path: every name in it, operators too, says its schema.
CREATE PROCEDURE @extschema@.backup_wait(job bigint, timeout interval DEFAULT '1 hour')
    LANGUAGE plpgsql
    AS $procedure$
DECLARE
    deadline pg_catalog.timestamptz :=
        pg_catalog.clock_timestamp() OPERATOR(pg_catalog.+) timeout;
BEGIN
    IF timeout IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'null_value_not_allowed',
            MESSAGE = 'timeout is null',
            HINT = 'Give an interval, or leave it out to wait for up to one hour.';
    END IF;
    PERFORM dbmodule.require_waitable(job);
    -- COMMIT always fails under an exception handler, with one message where the transaction is the
    -- caller's to end and with another where only the handler is in the way.
    BEGIN
        COMMIT;
    EXCEPTION WHEN invalid_transaction_termination THEN
        IF SQLERRM OPERATOR(pg_catalog.=) dbmodule.commit_refusal() THEN
            RAISE EXCEPTION USING ERRCODE = 'active_sql_transaction',
                MESSAGE = 'backup_wait cannot run inside a transaction block or a function',
                HINT = 'Call it on its own, after COMMIT, with autocommit on.';
        END IF;
    END;
    WHILE NOT dbmodule.job_has_ended(job) LOOP
        COMMIT;
        IF pg_catalog.clock_timestamp() OPERATOR(pg_catalog.>=) deadline THEN
            RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state',
                MESSAGE = pg_catalog.format('job %s did not end within %s', job, timeout),
                HINT = 'It goes on: SELECT * FROM backup_status(job) shows how far it is.';
        END IF;
        PERFORM pg_catalog.pg_sleep(0.25);
        COMMIT;
    END LOOP;
END
$procedure$;
COMMENT ON PROCEDURE @extschema@.backup_wait(bigint, interval) IS
    'Wait until a job completes; raises its error when it fails. Holds no snapshot between looks';

-- Grants ---------------------------------------------------------------------------------------

REVOKE ALL ON SCHEMA dbmodule FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA dbmodule FROM PUBLIC;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA dbmodule FROM PUBLIC;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA dbmodule FROM PUBLIC;
REVOKE ALL ON FUNCTION @extschema@.backup_full(text, text) FROM PUBLIC;
REVOKE ALL ON FUNCTION @extschema@.backup_differential(text, text, text) FROM PUBLIC;
REVOKE ALL ON FUNCTION @extschema@.backup_incremental(text, text, text) FROM PUBLIC;
REVOKE ALL ON FUNCTION @extschema@.backup_status(bigint) FROM PUBLIC;
REVOKE ALL ON FUNCTION @extschema@.backup_chain(text) FROM PUBLIC;
REVOKE ALL ON PROCEDURE @extschema@.backup_wait(bigint, interval) FROM PUBLIC;

GRANT USAGE ON SCHEMA dbmodule TO dbmodule_reader;
GRANT SELECT ON ALL TABLES IN SCHEMA dbmodule TO dbmodule_reader;
GRANT EXECUTE ON FUNCTION dbmodule.version() TO dbmodule_reader;
GRANT EXECUTE ON FUNCTION dbmodule.agent_is_running() TO dbmodule_reader;
GRANT EXECUTE ON FUNCTION dbmodule.chain_of(text) TO dbmodule_reader;
GRANT EXECUTE ON FUNCTION @extschema@.backup_status(bigint) TO dbmodule_reader;
GRANT EXECUTE ON FUNCTION @extschema@.backup_chain(text) TO dbmodule_reader;

GRANT EXECUTE ON FUNCTION dbmodule.commit_refusal() TO dbmodule_operator;
GRANT EXECUTE ON FUNCTION dbmodule.require_waitable(bigint) TO dbmodule_operator;
GRANT EXECUTE ON FUNCTION dbmodule.job_has_ended(bigint) TO dbmodule_operator;
GRANT EXECUTE ON FUNCTION @extschema@.backup_full(text, text) TO dbmodule_operator;
GRANT EXECUTE ON FUNCTION @extschema@.backup_differential(text, text, text) TO dbmodule_operator;
GRANT EXECUTE ON FUNCTION @extschema@.backup_incremental(text, text, text) TO dbmodule_operator;
GRANT EXECUTE ON PROCEDURE @extschema@.backup_wait(bigint, interval) TO dbmodule_operator;

GRANT USAGE ON SCHEMA dbmodule TO dbmodule_agent;
GRANT SELECT, INSERT, UPDATE, DELETE ON dbmodule.backup, dbmodule.backup_dependency,
    dbmodule.backup_relation, dbmodule.corrupt_page TO dbmodule_agent;
GRANT SELECT, INSERT, UPDATE, DELETE ON dbmodule.job TO dbmodule_agent;
GRANT SELECT, INSERT, DELETE ON dbmodule.lineage, dbmodule.event TO dbmodule_agent;
