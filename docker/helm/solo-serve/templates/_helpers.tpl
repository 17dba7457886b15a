{{- define "solo.labels" -}}
app.kubernetes.io/name: solo-serve
{{- end }}

{{- define "solo.settings" -}}
{{- $all := dict }}
{{- range $name, $value := .Values.settings }}{{ $_ := set $all $name (toString $value) }}{{ end }}
{{- if .Values.models.claim }}{{ $_ := set $all "SOLO_MODEL_POLL_S" (toString .Values.models.pollSeconds) }}{{ end }}
{{- if .Values.apiKeys.secret }}{{ $_ := set $all "SOLO_KEYS_FILE" "/etc/solo-serve/keys.json" }}{{ end }}
{{- if .Values.jobs.enabled }}{{ $_ := set $all "SOLO_JOBS_DIR" "/jobs" }}{{ end }}
{{- toYaml $all }}
{{- end }}

{{- define "solo.spread" -}}
- topologyKey: {{ . }}
  maxSkew: 1
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels:
      app.kubernetes.io/name: solo-serve
  matchLabelKeys: [pod-template-hash]
{{- end }}
