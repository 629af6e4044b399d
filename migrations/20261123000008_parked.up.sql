-- What a process can't read, because a newer version wrote it or because it is damaged, is parked.

-- Puts a claimed request back that the process can't read. The attempt is not counted. A poll may
-- claim the request again after the delay that is returned: as long as the request has been parked,
-- between 5 seconds and 10 minutes. Returns NULL if the claim is not the latest.
CREATE FUNCTION park_request(p_id uuid, p_claim_no int, p_reason text) RETURNS interval
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_since timestamptz;
    v_delay interval;
BEGIN
    PERFORM FROM mq_msgs m WHERE m.id = p_id AND m.claim_no = p_claim_no FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    UPDATE mq_payloads p
    SET parked_since = CASE
            WHEN next_claim_no(p.parked_claim_no) = p_claim_no AND isfinite(p.parked_since)
            THEN p.parked_since ELSE v_now END,
        parked_claim_no = next_claim_no(p_claim_no), parked_reason = p_reason
    WHERE p.id = p_id RETURNING p.parked_since INTO v_since;
    v_delay := least(greatest(v_now - v_since, '5 seconds'), '10 minutes');
    UPDATE mq_msgs m
    SET state = 'parked', claim_no = next_claim_no(m.claim_no),
        attempts = greatest(m.attempts, 1) - 1, attempt_at = v_now + v_delay
    WHERE m.id = p_id;
    RETURN v_delay;
END;
$$;
