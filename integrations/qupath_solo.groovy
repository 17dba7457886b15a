// QuPath 0.5: segments the selected annotation, or the whole image, through a running solo-serve.
// Automate > Script editor > Run.
import qupath.lib.io.PathIO
import qupath.lib.objects.PathObjectTools
import qupath.lib.regions.RegionRequest
import qupath.lib.scripting.QP

import java.awt.geom.AffineTransform
import java.net.http.HttpClient
import java.net.http.HttpRequest
import java.net.http.HttpResponse
import javax.imageio.ImageIO

def url = 'http://localhost:8000'
def model = 'nuclei'
def apiKey = ''

def server = QP.getCurrentServer()
def parent = QP.getSelectedObject()
def request = parent?.getROI() == null
    ? RegionRequest.createInstance(server)
    : RegionRequest.createInstance(server.getPath(), 1.0, parent.getROI())

def bytes = new ByteArrayOutputStream()
ImageIO.write(server.readRegion(request), 'png', bytes)
def query = "format=geojson&model=${URLEncoder.encode(model, 'UTF-8')}"
def post = HttpRequest.newBuilder(URI.create("${url}/segment?${query}"))
    .header('Content-Type', 'image/png')
    .POST(HttpRequest.BodyPublishers.ofByteArray(bytes.toByteArray()))
if (apiKey) post.header('X-API-Key', apiKey)
def answer = HttpClient.newHttpClient().send(post.build(), HttpResponse.BodyHandlers.ofString())
if (answer.statusCode() != 200) throw new IOException("${answer.statusCode()}: ${answer.body()}")

def data = new ByteArrayInputStream(answer.body().getBytes('UTF-8'))
def found = PathIO.readObjectsFromGeoJSON(data)
def place = AffineTransform.getTranslateInstance(request.getX(), request.getY())
def detections = found.collect { PathObjectTools.transformObject(it, place, true) }
if (parent == null) QP.addObjects(detections)
else {
    parent.addChildObjects(detections)
    QP.fireHierarchyUpdate()
}
println "${detections.size()} objects"
