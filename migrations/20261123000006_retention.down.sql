DROP FUNCTION delete_handled;
DROP FUNCTION delete_expired;
DROP FUNCTION empty_slot;
DROP FUNCTION move_unhandled;
DROP FUNCTION expired_slots;
