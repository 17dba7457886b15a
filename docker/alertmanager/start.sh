#!/bin/sh
# Writes Alertmanager's configuration from the ALERT_* variables of .env, then starts Alertmanager.
set -eu

quote() { # a YAML string
  printf "'%s'" "$(printf %s "$1" | sed "s/'/''/g")"
}

if [ -n "${ALERT_EMAIL_TO:-}" ]; then
  : "${ALERT_EMAIL_FROM:?is needed with ALERT_EMAIL_TO}" "${ALERT_SMTP_HOST:?is needed with ALERT_EMAIL_TO, as host:port}"
fi
config=${TMPDIR:-/tmp}/alertmanager.yml
{
  cat <<END
route:
  receiver: operators
  group_by: [alertname, instance]
  group_wait: ${ALERT_GROUP_WAIT:-30s}
  group_interval: 5m
  repeat_interval: 4h
inhibit_rules: # a server that cannot be scraped raises no other alert
  - source_matchers: ['alertname = "SoloDown"']
    target_matchers: ['alertname = "SoloNotReady"']
    equal: [instance]
receivers:
  - name: operators
END
  if [ -n "${ALERT_WEBHOOK_URL:-}" ]; then
    printf '    webhook_configs:\n      - url: %s\n' "$(quote "$ALERT_WEBHOOK_URL")"
  fi
  if [ -n "${ALERT_SLACK_URL:-}" ]; then
    printf '    slack_configs:\n      - api_url: %s\n        channel: %s\n        send_resolved: true\n' \
      "$(quote "$ALERT_SLACK_URL")" "$(quote "${ALERT_SLACK_CHANNEL:-}")"
  fi
  if [ -n "${ALERT_EMAIL_TO:-}" ]; then
    printf '    email_configs:\n      - to: %s\n        from: %s\n        smarthost: %s\n        send_resolved: true\n' \
      "$(quote "$ALERT_EMAIL_TO")" "$(quote "$ALERT_EMAIL_FROM")" \
      "$(quote "$ALERT_SMTP_HOST")"
    if [ -n "${ALERT_SMTP_USER:-}" ]; then
      printf '        auth_username: %s\n        auth_password: %s\n' \
        "$(quote "$ALERT_SMTP_USER")" "$(quote "${ALERT_SMTP_PASSWORD:-}")"
    fi
  fi
} >"$config"
if [ -z "${ALERT_WEBHOOK_URL:-}${ALERT_SLACK_URL:-}${ALERT_EMAIL_TO:-}" ]; then
  echo "no receiver is set (ALERT_WEBHOOK_URL, ALERT_SLACK_URL, ALERT_EMAIL_TO): alerts are only listed" >&2
fi
exec alertmanager --config.file="$config" --storage.path=/alertmanager --cluster.listen-address= "$@"
