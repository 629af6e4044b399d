-- Plain SQL for applications in any language: `fire`, `cancel` and `response`. `status` is beside
-- the views.
--
-- `fire` stores what `Durable::fire_in` stores: the head of src/codec.rs, the destination and the
-- group of src/destination, the fingerprint of src/fingerprint.rs. It refuses what that refuses,
-- with the same texts. The tests fire the same requests both ways and compare the rows.

-- Refuses a request: SQLSTATE 22023, the field as the error's column, and a hint.
CREATE FUNCTION refuse(p_field text, p_reason text, p_hint text) RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    RAISE EXCEPTION USING
        ERRCODE = 'invalid_parameter_value',
        MESSAGE = pg_catalog.format('invalid request: %s: %s', p_field, p_reason),
        HINT = p_hint,
        COLUMN = p_field;
END;
$$;

-- A new id: UUID version 7, which begins with the time in milliseconds.
CREATE FUNCTION new_request_id() RETURNS uuid
LANGUAGE sql
VOLATILE
SET search_path FROM CURRENT
AS $$
    SELECT encode(
        set_bit(set_bit(
            overlay(
                uuid_send(gen_random_uuid())
                PLACING substring(
                    int8send((extract(epoch FROM clock_timestamp()) * 1000)::bigint) FROM 3
                ) FROM 1 FOR 6
            ), 52, 1
        ), 53, 1), 'hex'
    )::uuid
$$;

-- The group of a kind and a name. The last 16 bits of FNV-1a need only the last 16 bits of each
-- step.
CREATE FUNCTION group_of(p_kind text, p_name text) RETURNS text
LANGUAGE plpgsql
IMMUTABLE
SET search_path FROM CURRENT
AS $$
DECLARE
    v_name bytea := convert_to(p_name, 'UTF8');
    v_hash int := 8997; -- 0x2325
BEGIN
    FOR v_at IN 0..octet_length(v_name) - 1 LOOP
        v_hash := ((v_hash # get_byte(v_name, v_at)) * 435) & 65535; -- 0x01b3
    END LOOP;
    RETURN lpad(to_hex(v_hash), 4, '0') || '|' || p_kind || '|' || p_name;
END;
$$;

-- A part of what is hashed, behind its length.
CREATE FUNCTION hashed_part(p_part bytea) RETURNS bytea
LANGUAGE sql
IMMUTABLE
SET search_path FROM CURRENT
AS $$ SELECT int8send(octet_length(p_part)::bigint) || p_part $$;

-- The text of an option, or NULL.
CREATE FUNCTION text_option(p_options jsonb, p_field text) RETURNS text
LANGUAGE plpgsql
IMMUTABLE
SET search_path FROM CURRENT
AS $$
BEGIN
    IF coalesce(jsonb_typeof(p_options -> p_field), 'null') NOT IN ('null', 'string') THEN
        PERFORM refuse(
            p_field, 'must be a text',
            format('Write it in quotes, as in {"%s": "a text"}.', p_field)
        );
    END IF;
    RETURN p_options ->> p_field;
END;
$$;

-- A time in milliseconds, or NULL. `p_name` is what the reason calls it.
CREATE FUNCTION duration_ms(p_field text, p_name text, p_value jsonb) RETURNS bigint
LANGUAGE plpgsql
IMMUTABLE
SET search_path FROM CURRENT
SET intervalstyle = postgres
-- Its errors are expected.
SET exit_on_error = off
AS $$
DECLARE
    c_hint CONSTANT text := 'Write an interval in quotes, such as "30 seconds" or "2 days".';
    v_ms numeric;
BEGIN
    IF coalesce(jsonb_typeof(p_value), 'null') = 'null' THEN
        RETURN NULL;
    ELSIF jsonb_typeof(p_value) = 'string' THEN
        BEGIN
            v_ms := extract(epoch FROM (p_value #>> '{}')::interval) * 1000;
        EXCEPTION WHEN data_exception THEN
            NULL;
        END;
    END IF;
    IF v_ms IS NULL OR v_ms = 'NaN' THEN
        PERFORM refuse(p_field, p_name || 'must be an interval', c_hint);
    ELSIF v_ms < 0 THEN
        PERFORM refuse(p_field, p_name || 'must not be negative', c_hint);
    END IF;
    RETURN trunc(least(v_ms, 1e18))::bigint;
END;
$$;

-- The URL as it is stored, and its destination. Refuses what clients would change.
CREATE FUNCTION request_url(p_url text, OUT url text, OUT destination text)
LANGUAGE plpgsql
IMMUTABLE
SET search_path FROM CURRENT
-- An address that is none is expected.
SET exit_on_error = off
AS $$
DECLARE
    c_hint CONSTANT text := 'Give a URL such as https://example.com/path?query=value.';
    -- The fragment is not sent.
    v_parts text[] := regexp_match(
        split_part(p_url, '#', 1), '^([A-Za-z][A-Za-z0-9+.-]*)://([^/?]*)([^?]*)(.*)$'
    );
    v_scheme text := lower(v_parts[1] COLLATE "C");
    v_authority text := v_parts[2];
    v_path text := v_parts[3];
    v_query text := v_parts[4];
    v_user text := coalesce(substring(v_authority FROM '^.*@'), '');
    v_at text := substr(v_authority, length(v_user) + 1);
    v_host text := lower(substring(v_at FROM '^(\[[^]]*\]|[^:]*)') COLLATE "C");
    v_port text := substr(v_at, length(v_host) + 1);
    v_last text;
    v_is_normal boolean;
BEGIN
    IF p_url IS NULL THEN
        PERFORM refuse('url', 'must not be NULL', c_hint);
    ELSIF v_parts IS NULL THEN
        PERFORM refuse('url', 'must be absolute, with a scheme and a host', c_hint);
    ELSIF v_scheme NOT IN ('http', 'https') THEN
        PERFORM refuse('url', 'its scheme must be http or https', c_hint);
    ELSIF v_host IN ('', '[]') THEN
        PERFORM refuse('url', 'must have a host', c_hint);
    ELSIF v_host !~ '^(\[[0-9a-f:.]+\]|[a-z0-9!$&''()*+,;=_~.-]+)$'
        OR v_user !~ '^[A-Za-z0-9!$&''()*+,;=_~.:%@-]*$'
    THEN
        PERFORM refuse('url', 'must be a valid http or https URL', c_hint);
    ELSIF v_port !~ '^(:[0-9]{0,100})?$' OR nullif(substr(v_port, 2), '')::numeric > 65535 THEN
        PERFORM refuse('url', 'its port must be a number up to 65535', c_hint);
    ELSIF octet_length(v_authority || v_path || v_query) + 8 > 8192 THEN
        PERFORM refuse(
            'url', 'must be at most 8192 bytes long', 'Send long values in the body.'
        );
    END IF;
    -- The last label, which may have a dot behind it, decides whether the host is an address.
    v_last := substring(v_host FROM '([^.]*)\.?$');
    v_is_normal := CASE
        -- Postgres writes the last part of some addresses in decimal numbers, and URLs don't.
        WHEN v_host ~ '^\[::(ffff:(0|[1-9a-f][0-9a-f]{0,3})|[1-9a-f][0-9a-f]{0,3}):'
            '(0|[1-9a-f][0-9a-f]{0,3})\]$' THEN true
        WHEN v_host LIKE '[%' THEN is_normal_ipv6(substr(v_host, 2, length(v_host) - 2))
        WHEN v_last ~ '^([0-9]+|0x[0-9a-f]*)$' THEN
            v_host ~ '^((25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])(\.(?!$)|$)){4}$'
        ELSE true
    END;
    IF NOT v_is_normal
        OR v_path !~ '^[]!$-;=@-[^_a-z|~]*$'
        OR v_query !~ '^[!$-&(-;=?-~]*$'
        OR lower(v_path COLLATE "C") ~ '(^|/)(\.|%2e){1,2}(/|$)'
    THEN
        PERFORM refuse(
            'url',
            'is not in its normal form, so not every client would send it as given; resolve '
            '`.` and `..`, and percent-encode what `Url::parse` encodes',
            'Percent-encode spaces, quotes, <, >, `, {, } and other characters than ASCII.'
        );
    END IF;
    url := v_scheme || '://' || v_authority || coalesce(nullif(v_path, ''), '/') || v_query;
    destination := v_scheme || '://' || v_host || ':' || coalesce(
        nullif(substr(v_port, 2), '')::int,
        CASE v_scheme WHEN 'https' THEN 443 ELSE 80 END
    );
END;
$$;

-- Whether an IPv6 address is written as URLs write it.
CREATE FUNCTION is_normal_ipv6(p_host text) RETURNS boolean
LANGUAGE plpgsql
IMMUTABLE
SET search_path FROM CURRENT
-- Its errors are expected.
SET exit_on_error = off
AS $$
BEGIN
    RETURN host(p_host::inet) = p_host AND strpos(p_host, '.') = 0;
EXCEPTION WHEN data_exception THEN
    RETURN false;
END;
$$;

-- The retry policy as it is stored. NULL: the default of fired requests.
CREATE FUNCTION retry_policy(p_retry jsonb) RETURNS text
LANGUAGE plpgsql
IMMUTABLE
SET search_path FROM CURRENT
AS $$
DECLARE
    c_most CONSTANT bigint := 3153600000000; -- A hundred years.
    c_hint CONSTANT text := 'Write {"base": "1 second", "factor": 2, "cap": "5 minutes", '
        '"max_age": "1 day", "max_attempts": 10}, {"schedule": ["5 seconds", "5 minutes"]}, '
        '{"constant": "10 seconds"}, "webhooks" or "none".';
    c_fields CONSTANT text[] := '{base,factor,cap,schedule,constant,jitter,max_age,max_attempts,'
        'max_retry_after}';
    v_retry jsonb := coalesce(nullif(p_retry, 'null'), '{"max_age": "24 hours"}');
    v_unknown text;
    v_base bigint;
    v_cap bigint;
    v_factor float8;
    v_schedule bigint[];
    v_constant bigint;
    v_jitter text;
    v_age bigint;
    v_asked bigint;
    v_attempts bigint;
    v_delays text;
BEGIN
    IF v_retry = '"none"' THEN
        RETURN '{"delays":"none","jitter":"none"}';
    ELSIF v_retry = '"webhooks"' THEN
        v_retry := '{"schedule": ["5 seconds", "5 minutes", "30 minutes", "2 hours", "5 hours",
            "10 hours", "14 hours", "20 hours", "24 hours"], "jitter": "equal"}';
    ELSIF jsonb_typeof(v_retry) <> 'object' THEN
        PERFORM refuse('retry', 'must be an object, `webhooks` or `none`', c_hint);
    END IF;
    v_unknown := (
        SELECT string_agg('`' || k.name || '`', ', ' ORDER BY k.name)
        FROM jsonb_object_keys(v_retry) AS k(name) WHERE k.name <> ALL (c_fields)
    );
    IF v_unknown IS NOT NULL THEN
        PERFORM refuse('retry', 'has unknown fields: ' || v_unknown, c_hint);
    END IF;
    v_retry := jsonb_strip_nulls(v_retry);
    v_jitter := coalesce(
        text_option(v_retry, 'jitter'), CASE WHEN v_retry ?| '{schedule,constant}' THEN 'none' END,
        'full'
    );
    IF v_jitter NOT IN ('full', 'equal', 'none') THEN
        PERFORM refuse('retry', '`jitter` must be full, equal or none', c_hint);
    ELSIF v_retry ?& '{schedule,constant}' THEN
        PERFORM refuse('retry', '`schedule` and `constant` exclude each other', c_hint);
    ELSIF v_retry ?| '{schedule,constant}' AND v_retry ?| '{base,factor,cap}' THEN
        PERFORM refuse(
            'retry',
            CASE WHEN v_retry ? 'base' THEN '`base`' WHEN v_retry ? 'factor' THEN '`factor`'
                ELSE '`cap`' END || ' applies to exponential policies only',
            c_hint
        );
    END IF;
    IF v_retry ? 'schedule' THEN
        IF jsonb_typeof(v_retry -> 'schedule') <> 'array' THEN
            PERFORM refuse('retry', '`schedule` must be an array of intervals', c_hint);
        ELSIF jsonb_array_length(v_retry -> 'schedule') = 0 THEN
            PERFORM refuse(
                'retry', 'the schedule is empty; use `none` for a single attempt', c_hint
            );
        ELSIF jsonb_array_length(v_retry -> 'schedule') > 1000 THEN
            PERFORM refuse('retry', 'the schedule must have at most 1,000 delays', c_hint);
        END IF;
        v_schedule := ARRAY(
            SELECT coalesce(duration_ms('retry', 'each delay ', e.delay), 0)
            FROM jsonb_array_elements(v_retry -> 'schedule') WITH ORDINALITY AS e(delay, number)
            ORDER BY e.number
        );
        IF 1 > ANY (v_schedule) THEN
            PERFORM refuse('retry', 'each delay must be at least one millisecond', c_hint);
        ELSIF c_most < ANY (v_schedule) THEN
            PERFORM refuse('retry', 'each delay must be at most a hundred years', c_hint);
        END IF;
        v_delays := '{"schedule_ms":[' || array_to_string(v_schedule, ',') || ']}';
    ELSIF v_retry ? 'constant' THEN
        v_constant := duration_ms('retry', 'the delay ', v_retry -> 'constant');
        IF v_constant < 1 THEN
            PERFORM refuse('retry', 'each delay must be at least one millisecond', c_hint);
        ELSIF v_constant > c_most THEN
            PERFORM refuse('retry', 'the delay must be at most a hundred years', c_hint);
        END IF;
        v_delays := '{"constant_ms":' || v_constant || '}';
    ELSE
        v_base := coalesce(duration_ms('retry', '`base` ', v_retry -> 'base'), 1000);
        v_cap := coalesce(duration_ms('retry', '`cap` ', v_retry -> 'cap'), 300000);
        IF v_retry ? 'factor' AND jsonb_typeof(v_retry -> 'factor') <> 'number'
            OR abs((v_retry ->> 'factor')::numeric) > 1e300
        THEN
            PERFORM refuse('retry', '`factor` must be a finite number of at least 1', c_hint);
        END IF;
        v_factor := coalesce((v_retry ->> 'factor')::numeric::float8, 2);
        IF v_base < 1 THEN
            PERFORM refuse('retry', '`base` must be at least one millisecond', c_hint);
        ELSIF v_factor < 1 THEN
            PERFORM refuse('retry', '`factor` must be a finite number of at least 1', c_hint);
        ELSIF v_cap < v_base THEN
            PERFORM refuse('retry', '`cap` must not be below `base`', c_hint);
        ELSIF v_cap > c_most THEN
            PERFORM refuse('retry', '`cap` must be at most a hundred years', c_hint);
        END IF;
        v_delays := format(
            '{"exponential":{"base_ms":%s,"factor":%s,"cap_ms":%s}}', v_base,
            CASE WHEN v_factor::text ~ '[.e]' THEN replace(v_factor::text, 'e+', 'e')
                ELSE v_factor::text || '.0' END,
            v_cap
        );
    END IF;
    v_age := duration_ms('retry', '`max_age` ', v_retry -> 'max_age');
    v_asked := duration_ms('retry', '`max_retry_after` ', v_retry -> 'max_retry_after');
    IF v_age > c_most THEN
        PERFORM refuse(
            'retry',
            '`max_age` must be at most a hundred years; use `for_ever` for no limit',
            'Leave `max_age` out for no limit.'
        );
    ELSIF v_asked > c_most THEN
        PERFORM refuse('retry', '`max_retry_after` must be at most a hundred years', c_hint);
    ELSIF v_retry ? 'max_attempts' THEN
        IF jsonb_typeof(v_retry -> 'max_attempts') <> 'number'
            OR (v_retry ->> 'max_attempts')::numeric NOT BETWEEN 1 AND 4294967295
            OR (v_retry ->> 'max_attempts')::numeric % 1 <> 0
        THEN
            PERFORM refuse('retry', '`max_attempts` must be at least 1', c_hint);
        END IF;
        v_attempts := (v_retry ->> 'max_attempts')::numeric;
    END IF;
    RETURN '{"delays":' || v_delays || ',"jitter":"' || v_jitter || '"'
        || coalesce(',"max_age_ms":' || v_age, '')
        || coalesce(',"max_attempts":' || v_attempts, '')
        || coalesce(',"max_retry_after_ms":' || v_asked, '') || '}';
END;
$$;

-- The responses that complete a request, as they are stored, or NULL.
CREATE FUNCTION accepted_responses(p_accept jsonb) RETURNS text
LANGUAGE plpgsql
IMMUTABLE
SET search_path FROM CURRENT
AS $$
DECLARE
    c_hint CONSTANT text := 'Write an array of statuses, ranges and words: [404, [200, 204], '
        '"success", "any"].';
    v_all text[];
BEGIN
    IF coalesce(jsonb_typeof(p_accept), 'null') = 'null' THEN
        RETURN NULL;
    ELSIF jsonb_typeof(p_accept) <> 'array' THEN
        PERFORM refuse('accept', 'must be an array', c_hint);
    ELSIF jsonb_array_length(p_accept) = 0 THEN
        PERFORM refuse('accept', 'the list is empty; name at least one response', c_hint);
    END IF;
    v_all := ARRAY(
        SELECT CASE
            WHEN a.one IN ('"success"', '"any"') THEN a.one::text
            WHEN a.one::text ~ '^[1-9][0-9]{2}$' THEN '{"status":' || a.one::text || '}'
            WHEN a.one::text ~ '^\[[1-9][0-9]{2}, [1-9][0-9]{2}\]$' THEN
                '{"range":' || replace(a.one::text, ' ', '') || '}'
        END
        FROM jsonb_array_elements(p_accept) WITH ORDINALITY AS a(one, number)
        ORDER BY a.number
    );
    IF array_position(v_all, NULL) IS NOT NULL THEN
        PERFORM refuse(
            'accept', 'each must be a status from 100 to 999, a range, success or any', c_hint
        );
    END IF;
    RETURN '[' || array_to_string(v_all, ',') || ']';
END;
$$;

-- The headers in their order, with the names in lower case and each byte of a value as the
-- character with its number. As in http's map, the values of a name stand where its first one was.
CREATE FUNCTION request_headers(p_headers jsonb, OUT names text[], OUT contents text[])
LANGUAGE plpgsql
IMMUTABLE
SET search_path FROM CURRENT
AS $$
DECLARE
    c_hint CONSTANT text := 'Write {"accept": "text/plain", "x-tag": ["a", "b"]} or '
        '[["accept", "text/plain"]].';
    v_names jsonb[];
    v_values jsonb[];
    v_bytes int;
BEGIN
    IF coalesce(jsonb_typeof(p_headers), 'null') = 'null' THEN
        names := '{}';
        contents := '{}';
        RETURN;
    ELSIF jsonb_typeof(p_headers) = 'object' THEN
        SELECT array_agg(to_jsonb(h.name) ORDER BY h.number, e.number),
            array_agg(e.value ORDER BY h.number, e.number)
        INTO v_names, v_values
        FROM jsonb_each(p_headers) WITH ORDINALITY AS h(name, value, number)
        CROSS JOIN LATERAL jsonb_array_elements(
            CASE jsonb_typeof(h.value) WHEN 'array' THEN h.value ELSE jsonb_build_array(h.value) END
        ) WITH ORDINALITY AS e(value, number);
    ELSIF jsonb_typeof(p_headers) = 'array' THEN
        SELECT array_agg(e.pair -> 0 ORDER BY e.number),
            array_agg(
                CASE WHEN jsonb_typeof(e.pair) = 'array' AND e.pair -> 2 IS NULL
                THEN e.pair -> 1 END ORDER BY e.number
            )
        INTO v_names, v_values
        FROM jsonb_array_elements(p_headers) WITH ORDINALITY AS e(pair, number);
    ELSE
        PERFORM refuse('headers', 'must be an object, or an array of pairs', c_hint);
    END IF;
    IF EXISTS (
        SELECT FROM unnest(v_names, v_values) AS h(name, value)
        WHERE jsonb_typeof(h.name) IS DISTINCT FROM 'string'
            OR jsonb_typeof(h.value) IS DISTINCT FROM 'string'
    ) THEN
        PERFORM refuse('headers', 'each must be a name and a text', c_hint);
    ELSIF EXISTS (
        SELECT FROM unnest(v_names) AS h(name)
        WHERE h.name #>> '{}' !~ '^[!#$%&''*+.^_`|~0-9A-Za-z-]+$'
            OR octet_length(h.name #>> '{}') > 65535
    ) THEN
        PERFORM refuse('headers', 'invalid HTTP header name', c_hint);
    ELSIF EXISTS (
        SELECT FROM unnest(v_values) AS h(value)
        WHERE h.value #>> '{}' ~ '[\x01-\x08\x0a-\x1f\x7f]'
    ) THEN
        PERFORM refuse('headers', 'failed to parse header value', c_hint);
    ELSIF cardinality(v_names) > 1000 THEN
        PERFORM refuse(
            'headers',
            'must have at most 1000 values, but have ' || cardinality(v_names),
            'Send long values in the body.'
        );
    END IF;
    SELECT
        coalesce(array_agg(o.name ORDER BY o.first, o.number), '{}'),
        coalesce(array_agg(o.value ORDER BY o.first, o.number), '{}'),
        coalesce(sum(octet_length(o.name) + length(o.value)), 0)
    INTO names, contents, v_bytes
    FROM (
        SELECT h.*, min(h.number) OVER (PARTITION BY h.name) AS first
        FROM (
            SELECT
                lower((i.name #>> '{}') COLLATE "C") AS name,
                convert_from(convert_to(i.value #>> '{}', 'UTF8'), 'LATIN1') AS value, i.number
            FROM unnest(v_names, v_values) WITH ORDINALITY AS i(name, value, number)
        ) h
    ) o;
    IF v_bytes > 262144 THEN
        PERFORM refuse(
            'headers', 'must be at most 262144 bytes long, but have ' || v_bytes,
            'Send long values in the body.'
        );
    END IF;
END;
$$;

-- Refuses headers that say wrongly where the body ends.
CREATE FUNCTION check_framing(p_names text[], p_contents text[], p_body int) RETURNS void
LANGUAGE plpgsql
IMMUTABLE
SET search_path FROM CURRENT
AS $$
DECLARE
    c_hint CONSTANT text := 'Leave both out: the client that sends adds what is needed.';
    v_lengths text[] := ARRAY(
        SELECT h.content FROM unnest(p_names, p_contents) AS h(name, content)
        WHERE h.name = 'content-length'
    );
    v_encodings text[] := ARRAY(
        SELECT lower(h.content COLLATE "C") FROM unnest(p_names, p_contents) AS h(name, content)
        WHERE h.name = 'transfer-encoding'
    );
BEGIN
    IF cardinality(v_lengths) > 1
        OR v_lengths[1] !~ '^[0-9]{1,100}$' OR v_lengths[1]::numeric <> p_body
    THEN
        PERFORM refuse(
            'headers',
            format(
                'Content-Length must be that of the body, which has %s bytes; leave it out, and '
                'it is added', p_body
            ),
            c_hint
        );
    ELSIF cardinality(v_encodings) > 1 OR v_encodings[1] <> 'chunked' THEN
        PERFORM refuse(
            'headers', 'Transfer-Encoding must be `chunked`, or be left out', c_hint
        );
    ELSIF cardinality(v_encodings) + cardinality(v_lengths) > 1 THEN
        PERFORM refuse(
            'headers', 'Transfer-Encoding and Content-Length must not be given together', c_hint
        );
    END IF;
END;
$$;

-- The metadata of a request without spaces, or NULL.
CREATE FUNCTION request_metadata(p_metadata jsonb) RETURNS json
LANGUAGE plpgsql
IMMUTABLE
SET search_path FROM CURRENT
AS $$
DECLARE
    c_hint CONSTANT text := 'Keep what is large in a table of your own, and its id here.';
    v_text text := regexp_replace(
        nullif(p_metadata, 'null')::text, '("(?:[^"\\]|\\.)*")|\s+', '\1', 'g'
    );
BEGIN
    IF octet_length(v_text) > 4096 THEN
        PERFORM refuse(
            'metadata',
            'must be at most 4096 bytes of JSON, but has ' || octet_length(v_text), c_hint
        );
    ELSIF jsonb_path_exists(
        p_metadata, 'strict $.**{100 to last} ? (@.type() == "array" || @.type() == "object")'
    ) THEN
        PERFORM refuse('metadata', 'must not nest more than 100 levels deep', c_hint);
    ELSIF EXISTS (
        SELECT FROM jsonb_path_query(p_metadata, 'strict $.** ? (@.type() == "number")') AS n(one)
        WHERE abs(n.one::numeric) > 1.7976931348623157e308
    ) THEN
        PERFORM refuse('metadata', 'has a number that no 64-bit floating point can be', c_hint);
    END IF;
    RETURN v_text;
END;
$$;

-- Refuses options that are unknown, or that no request can have.
CREATE FUNCTION check_options(p_options jsonb) RETURNS void
LANGUAGE plpgsql
IMMUTABLE
SET search_path FROM CURRENT
AS $$
DECLARE
    c_known CONSTANT text[] := '{accept,attempt_timeout,channel,deadline,delay,guarantee,'
        'halt_on_discard,idempotency_header,key,key_owner,limit_key,metadata,ordered,priority,'
        'retry,sensitive,supersede}';
    c_most CONSTANT bigint := 3153600000000; -- A hundred years.
    c_too_long CONSTANT text := 'must be at most a hundred years';
    v_hint text := 'The options are ' || array_to_string(c_known, ', ') || '.';
    v_unknown text;
    v_field text;
    v_text text;
    v_delay bigint;
    v_deadline bigint;
    v_timeout bigint;
BEGIN
    IF jsonb_typeof(p_options) <> 'object' THEN
        PERFORM refuse('options', 'must be an object', v_hint);
    END IF;
    v_unknown := (
        SELECT string_agg('`' || k.name || '`', ', ' ORDER BY k.name)
        FROM jsonb_object_keys(p_options) AS k(name) WHERE k.name <> ALL (c_known)
    );
    IF v_unknown IS NOT NULL THEN
        PERFORM refuse('options', 'unknown: ' || v_unknown, v_hint);
    END IF;
    v_text := text_option(p_options, 'channel');
    IF v_text = '' THEN
        PERFORM refuse('channel', 'the channel name must not be empty', 'Leave it out.');
    ELSIF octet_length(v_text) > 55 THEN
        PERFORM refuse(
            'channel', 'the channel name must be at most 55 bytes long', 'Use a shorter name.'
        );
    END IF;
    FOREACH v_field IN ARRAY '{ordered,key,key_owner,supersede,limit_key}'::text[] LOOP
        v_text := text_option(p_options, v_field);
        IF octet_length(v_text) > 255 THEN
            PERFORM refuse(
                v_field, 'must be at most 255 bytes long', 'Use a digest of a longer text.'
            );
        ELSIF v_text = '' THEN
            PERFORM refuse(v_field, 'must not be empty', 'Leave it out, or make it null.');
        END IF;
    END LOOP;
    IF strpos(p_options ->> 'limit_key', '://') > 0 THEN
        PERFORM refuse(
            'limit_key', 'must not contain `://`, which marks an origin',
            'Use a name such as tenant-7.'
        );
    END IF;
    PERFORM request_metadata(p_options -> 'metadata');
    v_delay := coalesce(duration_ms('delay', '', p_options -> 'delay'), 0);
    v_deadline := duration_ms('deadline', '', p_options -> 'deadline');
    v_timeout := duration_ms('attempt_timeout', '', p_options -> 'attempt_timeout');
    v_hint := 'Use a shorter interval.';
    IF v_delay > c_most THEN
        PERFORM refuse('delay', c_too_long, v_hint);
    ELSIF coalesce(jsonb_typeof(p_options -> 'halt_on_discard'), 'null')
        NOT IN ('null', 'boolean')
    THEN
        PERFORM refuse('halt_on_discard', 'must be true or false', 'Write it without quotes.');
    ELSIF p_options ->> 'halt_on_discard' = 'true' AND p_options ->> 'ordered' IS NULL THEN
        PERFORM refuse(
            'halt_on_discard', 'there is no ordering key to halt; set `ordered` too',
            'Write {"ordered": "customer-7", "halt_on_discard": true}.'
        );
    ELSIF v_deadline <= v_delay THEN
        PERFORM refuse(
            'deadline', 'must be longer than zero and longer than `delay`',
            'The deadline counts from now, as the delay does.'
        );
    ELSIF v_deadline > c_most THEN
        PERFORM refuse('deadline', c_too_long, v_hint);
    ELSIF v_timeout < 1 THEN
        PERFORM refuse(
            'attempt_timeout', 'must be longer than zero', 'The default is "30 seconds".'
        );
    ELSIF v_timeout > c_most THEN
        PERFORM refuse('attempt_timeout', c_too_long, v_hint);
    ELSIF text_option(p_options, 'guarantee') NOT IN ('at_least_once', 'at_most_once') THEN
        PERFORM refuse(
            'guarantee', 'must be at_least_once or at_most_once', 'The default is at_least_once.'
        );
    ELSIF text_option(p_options, 'priority') NOT IN ('high', 'normal', 'low') THEN
        PERFORM refuse('priority', 'must be high, normal or low', 'The default is normal.');
    ELSIF text_option(p_options, 'idempotency_header') NOT IN ('quoted', 'bare', 'none') THEN
        PERFORM refuse(
            'idempotency_header', 'must be quoted, bare or none',
            'For another name, set the header itself.'
        );
    ELSIF coalesce(jsonb_typeof(p_options -> 'sensitive'), 'null') NOT IN ('null', 'array') THEN
        PERFORM refuse(
            'sensitive', 'must be an array of names of headers', 'Write ["x-partner-token"].'
        );
    END IF;
END;
$$;

-- Fails if enqueue has refused a request.
CREATE FUNCTION check_verdict(
    p_verdict text,
    p_id uuid,
    p_elsewhere text,
    p_channel text,
    p_key text,
    p_ordered text
) RETURNS void
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
BEGIN
    IF p_verdict = 'conflict' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'unique_violation',
            MESSAGE = format(
                'request %s: invalid request: key: %s of channel %s already belongs to this '
                'request, which has a different method, URL, body or owner; use another key, or '
                'name the owner with Options::key_owner if only credentials changed',
                p_id, to_json(p_key), to_json(p_channel)
            ),
            HINT = 'Name the owner with the option key_owner. A request that a handle with '
                'other encryption keys has persisted can''t be compared in SQL.',
            COLUMN = 'key';
    ELSIF p_verdict = 'elsewhere' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_in_use',
            MESSAGE = format(
                'ordered: unfinished requests of channel %s have the ordering key %s; retry once '
                'they have finished, or use a different key in each channel',
                to_json(p_elsewhere), to_json(p_ordered)
            ),
            HINT = 'An ordering key belongs to one channel at a time.',
            COLUMN = 'ordered';
    END IF;
END;
$$;

-- Persists a request in the caller's transaction, as Durable::fire_in does: a commit sends it, a
-- rollback never does. Returns its id, or that of the earlier request with the same key.
CREATE FUNCTION fire(
    method text,
    url text,
    headers jsonb DEFAULT '{}',
    body bytea DEFAULT NULL,
    options jsonb DEFAULT '{}'
) RETURNS uuid
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
#variable_conflict use_column
DECLARE
    -- The headers that redact_headers begins with, and those of src/fingerprint.rs.
    c_secret CONSTANT text[] := '{authorization,proxy-authorization,cookie,set-cookie,x-api-key,'
        'api-key,apikey,x-auth-token,x-access-token}';
    c_credentials CONSTANT text[] := '{authorization,cookie,api-key,apikey,x-api-key,x-auth-token,'
        'x-access-token}';
    v_id uuid := new_request_id();
    v_options jsonb := coalesce(nullif(options, 'null'), '{}');
    v_body bytea := body;
    v_channel text;
    v_to record;
    v_headers record;
    v_marked text[];
    v_retry text;
    v_accept text;
    v_limit_key text;
    v_ordered text;
    v_key text;
    v_group text;
    v_fingerprint bytea;
    v_owner bytea;
    v_delay bigint;
    v_head text;
    v_found record;
BEGIN
    PERFORM check_options(v_options);
    v_retry := retry_policy(v_options -> 'retry');
    v_accept := accepted_responses(v_options -> 'accept');
    IF method IS NULL OR method !~ '^[!#$%&''*+.^_`|~0-9A-Za-z-]+$' THEN
        PERFORM refuse(
            'method', 'must be an HTTP method', 'Write it in capital letters, such as POST.'
        );
    END IF;
    v_to := request_url(url);
    v_headers := request_headers(headers);
    PERFORM check_framing(v_headers.names, v_headers.contents, coalesce(octet_length(v_body), 0));
    IF octet_length(v_body) > 8388608 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'invalid request: body: longer than 8388608 bytes; shorten it or raise '
                'max_request_body',
            HINT = 'A handle of the crate with a higher max_request_body takes longer ones.',
            COLUMN = 'body';
    END IF;
    v_channel := coalesce(v_options ->> 'channel', 'default');
    v_limit_key := v_options ->> 'limit_key';
    v_ordered := v_options ->> 'ordered';
    v_key := v_options ->> 'key';
    v_delay := coalesce(duration_ms('delay', '', v_options -> 'delay'), 0);
    v_marked := ARRAY(
        SELECT lower(s.name COLLATE "C")
        FROM jsonb_array_elements_text(nullif(v_options -> 'sensitive', 'null')) AS s(name)
    );
    IF v_key IS NOT NULL THEN
        v_fingerprint := sha256(
            hashed_part(convert_to(method, 'UTF8')) || hashed_part(convert_to(v_to.url, 'UTF8'))
            || CASE WHEN v_body <> '' THEN '\x01'::bytea ELSE '\x00' END || coalesce(v_body, '')
        );
        IF v_options ->> 'key_owner' IS NOT NULL THEN
            v_owner := hashed_part(convert_to(v_options ->> 'key_owner', 'UTF8'));
        ELSE
            v_owner := (
                SELECT string_agg(
                    hashed_part(convert_to(h.name, 'UTF8'))
                        || hashed_part(convert_to(h.content, 'LATIN1')),
                    '' ORDER BY h.name COLLATE "C", h.number
                )
                FROM unnest(v_headers.names, v_headers.contents) WITH ORDINALITY
                    AS h(name, content, number)
                WHERE h.name = ANY (c_credentials || v_marked)
            );
        END IF;
        IF v_owner IS NOT NULL THEN
            v_fingerprint := sha256(v_fingerprint || sha256(v_owner));
        END IF;
    END IF;
    IF coalesce(v_options ->> 'guarantee', 'at_least_once') = 'at_least_once'
        AND coalesce(v_options ->> 'idempotency_header', 'quoted') <> 'none'
        AND method NOT IN ('GET', 'HEAD', 'PUT', 'DELETE', 'OPTIONS', 'TRACE')
        AND 'idempotency-key' <> ALL (v_headers.names)
    THEN
        v_headers.names := v_headers.names || 'idempotency-key'::text;
        v_headers.contents := v_headers.contents
            || CASE WHEN v_options ->> 'idempotency_header' = 'bare' THEN v_id::text
                ELSE '"' || v_id || '"' END;
    END IF;
    v_head := (
        SELECT '{"method":' || to_json(method) || ',"url":' || to_json(v_to.url)
            || ',"version":"HTTP/1.1","headers":['
            || coalesce(string_agg(
                '[' || to_json(h.name) || ',' || to_json(h.content) || ']', ',' ORDER BY h.number
            ), '') || ']'
            || coalesce(
                ',"sensitive":[' || string_agg(
                    (h.number - 1)::text, ',' ORDER BY h.number
                ) FILTER (WHERE h.name = ANY (c_secret || v_marked)) || ']', ''
            )
        FROM unnest(v_headers.names, v_headers.contents) WITH ORDINALITY
            AS h(name, content, number)
    ) || ',"delivery":{"timeout_ms":'
        || coalesce(duration_ms('attempt_timeout', '', v_options -> 'attempt_timeout'), 30000)
        || ',"retry":' || v_retry || coalesce(',"accept":' || v_accept, '')
        || coalesce(
            ',"guarantee":"' || nullif(v_options ->> 'guarantee', 'at_least_once') || '"', ''
        )
        || coalesce(',"priority":"' || nullif(v_options ->> 'priority', 'normal') || '"', '')
        || coalesce(',"limit_key":' || to_json(v_limit_key), '') || '}}';
    v_group := CASE WHEN v_ordered IS NOT NULL THEN group_of('o', v_ordered)
        ELSE group_of('d', coalesce(v_limit_key, v_to.destination)) END;
    SELECT e.* INTO v_found FROM enqueue(
        v_id, v_channel, v_group, v_ordered IS NOT NULL,
        coalesce((v_options ->> 'halt_on_discard')::boolean, false),
        v_delay * interval '1 millisecond',
        duration_ms('deadline', '', v_options -> 'deadline') * interval '1 millisecond',
        'requeuest', v_head, v_body, NULL, 'waiting', NULL, v_key, v_fingerprint,
        v_options ->> 'supersede', default_retention(), v_delay < 1000, true, false,
        request_metadata(v_options -> 'metadata'),
        CASE WHEN v_ordered IS NOT NULL THEN coalesce(v_limit_key, v_to.destination) END,
        coalesce(v_options ->> 'priority', 'normal')::mq_priority
    ) e;
    PERFORM check_verdict(
        v_found.verdict, v_found.request_id, v_found.elsewhere, v_channel, v_key, v_ordered
    );
    RETURN v_found.request_id;
END;
$$;

-- Persists a request that Durable::statement has checked and encoded, and perhaps encrypted.
-- Returns its id, or that of the earlier request with the same key.
CREATE FUNCTION fire_prepared(p_request text, p_body bytea) RETURNS uuid
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    v_new record;
    v_found record;
BEGIN
    SELECT r.* INTO v_new FROM json_to_record(p_request::json) AS r(
        id uuid, channel text, "group" text, ordered boolean, halts boolean, delay_ms bigint,
        deadline_ms bigint, head text, key text, fingerprint text, supersede text,
        retention_ms bigint, notify boolean, metadata text, destination text, priority text
    );
    SELECT e.* INTO v_found FROM enqueue(
        v_new.id, v_new.channel, v_new."group", v_new.ordered, v_new.halts,
        v_new.delay_ms * interval '1 millisecond', v_new.deadline_ms * interval '1 millisecond',
        'requeuest', v_new.head, p_body, NULL, 'waiting', NULL, v_new.key,
        decode(v_new.fingerprint, 'hex'), v_new.supersede,
        v_new.retention_ms * interval '1 millisecond', v_new.notify, true, false,
        v_new.metadata::json, v_new.destination, v_new.priority::mq_priority
    ) e;
    PERFORM check_verdict(
        v_found.verdict, v_found.request_id, v_found.elsewhere, v_new.channel, v_new.key,
        substr(v_new."group", 8)
    );
    RETURN v_found.request_id;
END;
$$;

-- The retention of outcomes that no handle's setting is known for: that of DEFAULT_RETENTION.
CREATE FUNCTION default_retention() RETURNS interval
LANGUAGE sql
IMMUTABLE
AS $$ SELECT '24 hours'::pg_catalog.interval $$;

-- Cancels a request, as Durable::cancel does. Returns false if it has finished.
CREATE FUNCTION cancel(id uuid) RETURNS boolean
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_found text := cancel_request($1, default_retention());
BEGIN
    IF v_found IS NULL THEN
        PERFORM refuse_id($1);
    END IF;
    RETURN v_found = 'cancelled';
END;
$$;

CREATE FUNCTION refuse_id(p_id uuid) RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    RAISE EXCEPTION USING
        ERRCODE = 'no_data_found',
        MESSAGE = pg_catalog.concat(
            'request ' || p_id || ': ', 'there is no such request, or its outcome has expired; '
            'see DurableBuilder::retention'
        ),
        HINT = 'Give the id that fire has returned.';
END;
$$;

-- The response of a request that has finished, as Durable::response returns it, and no row while
-- the request has not.
CREATE FUNCTION response(id uuid)
RETURNS TABLE (status int, headers jsonb, body bytea)
LANGUAGE plpgsql
STABLE
SET search_path FROM CURRENT
SET enable_seqscan = off
AS $$
#variable_conflict use_column
DECLARE
    v_id uuid := $1;
    v_end record;
    v_why text;
BEGIN
    SELECT o.status, o.attempts, o.http_status, o.head, o.body, o.error_class, o.format
    INTO v_end
    FROM outcomes o WHERE o.id = v_id;
    IF NOT FOUND THEN
        IF NOT is_known(v_id) OR v_id IS NULL THEN
            PERFORM refuse_id(v_id);
        END IF;
        RETURN;
    END IF;
    v_why := CASE
        WHEN v_end.status IN ('completed', 'discarded') AND v_end.http_status IS NOT NULL THEN CASE
            WHEN v_end.error_class = 'response_too_large' THEN
                'the request was delivered and answered with ' || v_end.http_status
                || ', but the response body exceeds the limit; see max_response_body'
            WHEN v_end.format <> 1 OR v_end.head::json ->> 'headers' IS NULL THEN
                'its response is encrypted, or a newer version wrote it'
        END
        WHEN v_end.status = 'cancelled' AND v_end.error_class = 'superseded' THEN
            'the request was cancelled: a newer request superseded it'
        WHEN v_end.status = 'cancelled' THEN 'the request was cancelled'
        WHEN v_end.status = 'ambiguous' THEN 'the request may have been sent'
        WHEN v_end.status = 'completed' THEN
            'the request was resolved as sent, so it was delivered but its response is unknown'
        ELSE 'given up after ' || v_end.attempts || ' attempt'
            || CASE v_end.attempts WHEN 1 THEN '' ELSE 's' END
    END;
    IF v_why IS NOT NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('request %s: %s', v_id, v_why),
            HINT = 'See status, and the view attempts_view.';
    END IF;
    RETURN QUERY SELECT
        v_end.http_status::int, (v_end.head::json ->> 'headers')::jsonb,
        coalesce(v_end.body, '');
END;
$$;
