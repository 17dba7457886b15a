// The description of the API, shown by Swagger UI.

SwaggerUIBundle({ url: "openapi.json", dom_id: "#api", deepLinking: true });
